"""What `lowrank support` prints: a line for each strategy with the reasons below, or every combination as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from lowrank_train.config.paths import group_choices
from lowrank_train.config.schema import RunConfig
from lowrank_train.support import PARALLELISMS, STORAGES, Cell, cells, support_of

LETTERS = {"after_backward": "a", "project_in_backward": "p", "in_backward": "i"}
LEGEND = (
    "a, p, i: strategy.when=after_backward, project_in_backward, in_backward; -: none of them. Numbers are reasons.",
    "ddp_projected is trainer=ddp trainer.reduce=projected. Without accumulation and clipping, which rule out more.",
    "The moments are those of state in fp32. state: the other storages that run with the same ones; int8 is precision.",
)


def with_defaults(words: Sequence[str]) -> list[str]:
    """The words of a command line; where they name neither recipe nor model, a model that all strategies fit."""
    chosen = {word.partition("=")[0] for word in words}
    defaults = [] if "recipe" in chosen else ["recipe=null", *([] if "model" in chosen else ["model=llama_60m"])]
    return [*words, *defaults]


def support(config: RunConfig) -> int:
    """Print what runs of the strategy of `config`."""
    show(list(cells(config, config.strategy.name)), config.format)
    return 0


def support_all(words: Sequence[str]) -> int:
    """Print what runs of every strategy, under the words of a command line that names none."""
    show(list(support_of(words, group_choices()["strategy"])), "json" if "format=json" in words else "table")
    return 0


def show(found: Sequence[Cell], output: str) -> None:
    """Print combinations as a table or as JSON."""
    if output == "json":
        print(json.dumps([asdict(cell) | {"runs": cell.reason is None} for cell in found], indent=1))
    else:
        print("\n".join(table(found)))


class Notes:
    """Reasons, numbered in the order in which they come; those that differ only in names and lists are one."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, cell: Cell) -> int:
        """The number of the reason why a combination is refused."""
        assert cell.reason is not None
        text = cell.reason.replace(f"strategy {cell.strategy}", "strategy NAME")
        text = re.sub(r"deepspeed_zero\d", "deepspeed_zeroN", re.sub(r" \([^()]*\)", "", text))
        return self.numbers.setdefault(text, len(self.numbers) + 1)


def rows(found: Iterable[Cell], notes: Notes) -> dict[str, tuple[str, ...]]:
    """Strategy -> what stands in its line: a cell for each way of working together, then the storages."""
    by_strategy: dict[str, list[Cell]] = {}
    for cell in found:
        by_strategy.setdefault(cell.strategy, []).append(cell)
    lines = {}
    for strategy, members in by_strategy.items():
        plain = [cell for cell in members if cell.storage == STORAGES[0]]
        texts = [_cell([cell for cell in plain if cell.parallelism == name], notes) for name in PARALLELISMS]
        lines[strategy] = (*texts, _storages(members, notes))
    return lines


def _cell(members: Sequence[Cell], notes: Notes) -> str:
    letters = "".join(LETTERS[cell.moment] for cell in members if cell.reason is None)
    numbers = dict.fromkeys(notes.number(cell) for cell in members if cell.reason is not None)
    return " ".join([letters or "-", *([",".join(map(str, numbers))] if numbers else [])])


def _storages(members: Sequence[Cell], notes: Notes) -> str:
    """The storages that run wherever the first one does; those that do so only in places, with where not and why."""
    runs = {(cell.parallelism, cell.moment) for cell in members if cell.storage == STORAGES[0] and cell.reason is None}
    names: dict[str, list[str]] = {}
    for storage in STORAGES[1:]:
        here = [cell for cell in members if cell.storage == storage and (cell.parallelism, cell.moment) in runs]
        refused = [cell for cell in here if cell.reason is not None]
        if len(refused) < len(runs):
            where = ", ".join(dict.fromkeys(cell.parallelism for cell in refused))
            names.setdefault(f" (not {where}: {_numbers(refused, notes)})" if refused else "", []).append(storage)
    return "; ".join(f"{' '.join(storages)}{limit}" for limit, storages in names.items()) or "-"


def _numbers(refused: Iterable[Cell], notes: Notes) -> str:
    return ",".join(map(str, dict.fromkeys(notes.number(cell) for cell in refused)))


def table(found: Sequence[Cell]) -> Iterator[str]:
    """The lines that the command prints."""
    notes = Notes()
    lines = [("strategy", *PARALLELISMS, "state"), *((name, *texts) for name, texts in rows(found, notes).items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
    yield ""
    yield from LEGEND
    yield ""
    yield from (f"{number:>3}  {text}" for text, number in notes.numbers.items())


def grouped(found: Iterable[Cell]) -> dict[tuple[str, ...], list[str]]:
    """What stands in a line, without the reasons -> the strategies that have it, the commonest line first."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for strategy, texts in rows(found, Notes()).items():
        plain = tuple(re.sub(r":? [\d,]+", "", text) for text in texts)
        lines.setdefault(plain, []).append(strategy)
    return dict(sorted(lines.items(), key=lambda item: -len(item[1])))


def markdown(lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table; the first line is its head."""
    for number, line in enumerate(lines):
        yield f"| {' | '.join(line)} |"
        if number == 0:
            yield "|" + " --- |" * len(line)
