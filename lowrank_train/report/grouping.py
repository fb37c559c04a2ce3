"""Runs side by side: which belong together, which of them is best, in what they differ, what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lowrank_train.report.runs import RunRecord, differing, shown

NAMED_BY = ("strategy.name", "model.name", "precision.name", "data.name")
"""What tells a kind of run from another; other keys are what was tried within it."""

SAME_QUESTION = (
    "data.validation", "data.seq_len", "data.packing", "data.mask_documents", "data.validation_tokens",
)  # fmt: skip
"""Keys of the evaluation: perplexities under different ones answer different questions."""

SAME_DATA = {
    "tokenizer_fingerprint": "their tokenizers differ, and perplexity is per token of one tokenizer",
    "data_fingerprint": "they were trained on different data",
}


ALIKE = 0.005  # share by which two costs may differ and still be one


@dataclass(frozen=True)
class Group:
    """Runs of one kind."""

    label: str
    runs: list[RunRecord]
    best: RunRecord  # the lowest perplexity; a finished run before one that is not


def grouped(runs: list[RunRecord]) -> list[Group]:
    """The kinds, best first. Runs of a single kind are taken one by one, named by what they differ in."""
    telling = [key for key in NAMED_BY if len({shown(run.settings.get(key)) for run in runs}) > 1]
    if telling:
        found: dict[str, list[RunRecord]] = {}
        for run in runs:
            found.setdefault(" ".join(shown(run.settings.get(key)) for key in telling), []).append(run)
    else:
        keys = list(differing(runs))[:2]
        found = {}
        for run in runs:
            label = ", ".join(f"{key.rpartition('.')[2]} {shown(run.settings.get(key))}" for key in keys)
            found.setdefault(label if label and label not in found else run.name, []).append(run)
    groups = [Group(label, members, min(members, key=rank)) for label, members in found.items()]
    return sorted(groups, key=lambda group: rank(group.best))


def rank(run: RunRecord) -> tuple[bool, float]:
    """Lower is better."""
    perplexity = run.perplexity
    return not run.finished, math.inf if perplexity is None else perplexity


def best_lines(groups: list[Group]) -> list[str]:
    """The best run of each kind of which there are several, by the keys that were tried."""
    lines = []
    for group in groups:
        tried = differing(group.runs)
        if len(group.runs) > 1 and tried and group.best.perplexity is not None:
            words = " ".join(f"{key}={shown(group.best.settings.get(key))}" for key in tried)
            lines.append(f"  {group.label}: {group.best.perplexity:.2f} with {words}, of {len(group.runs)} runs")
    return ["best of each:", *lines] if lines else []


def difference_lines(runs: list[RunRecord]) -> list[str]:
    """The keys in which the runs differ, each value with the numbers of its runs."""
    lines = []
    for key, values in differing(runs).items():
        numbers: dict[str, list[int]] = {}
        for number, value in enumerate(values, 1):
            numbers.setdefault(shown(value), []).append(number)
        lines.append(f"  {key}: {_with_numbers(numbers)}")
    return ["the runs differ in:", *lines] if lines else []


def warnings(runs: list[RunRecord]) -> list[str]:
    """Why perplexities, speeds or memory of these runs do not stand on one scale."""
    found = [
        f"not comparable: {reason} ({told})"
        for key, reason in SAME_DATA.items()
        if (told := _told([str(run.result[key])[:8] if run.result and key in run.result else None for run in runs]))
    ]
    found += [
        f"not comparable: {key} differs, so they were evaluated on different things ({told})"
        for key in SAME_QUESTION
        if (told := _told([shown(run.settings.get(key)) for run in runs]))
    ]
    if told := _told([_machine(run) for run in runs]):
        found.append(f"speed, time and memory were measured on different machines ({told})")
    return found


def _machine(run: RunRecord) -> str | None:
    hardware = (run.result or {}).get("hardware")
    if not hardware:
        return None
    threads = f", {hardware['threads']} threads" if hardware["kind"] == "cpu" else ""
    return f"{hardware['device']} x {hardware['devices']}{threads}"


def _told(values: list[str | None]) -> str:
    """`a (#1, #2); b (#3)` where the values of the runs differ; nothing where they agree. None is not known."""
    numbers: dict[str, list[int]] = {}
    for number, value in enumerate(values, 1):
        if value is not None:
            numbers.setdefault(value, []).append(number)
    return _with_numbers(numbers) if len(numbers) > 1 else ""


def _with_numbers(numbers: dict[str, list[int]]) -> str:
    return "; ".join(f"{value} ({', '.join(f'#{n}' for n in found)})" for value, found in numbers.items())


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, loss) pairs those that no other beats in both, by rising cost: each costs more and loses less.

    Costs within ALIKE of one another count as equal: a few bytes of state are no choice.
    """
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if front and loss >= front[-1][1]:
            continue
        if front and cost <= front[-1][0] * (1 + ALIKE):
            front.pop()
        front.append((cost, loss))
    return front


def memory_of(runs: list[RunRecord]) -> tuple[str, Callable[[RunRecord], int | None]]:
    """Which memory stands on one scale for all: measured where all ran on GPUs, else that of the planned tensors.

    What a process on a CPU takes is mostly its libraries.
    """
    if any(run.on_gpu is False for run in runs) and any(run.planned_peak_bytes is not None for run in runs):
        return "planned peak memory of the tensors", lambda run: run.planned_peak_bytes
    return "measured peak memory", lambda run: run.peak_bytes


def back_to_front(groups: list[Group]) -> Iterator[tuple[int, Group, RunRecord]]:
    """Every run with the number of its kind: first those that are not the best of theirs, to be drawn below these."""
    for is_best in (False, True):
        for index, group in enumerate(groups):
            for run in group.runs:
                if (run is group.best) == is_best:
                    yield index, group, run
