"""Runs on GLUE tasks: a row a strategy, a column a metric, median and spread over seeds, and published figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_train.config.files import load_container
from lowrank_train.report.glue_rows import NAMES, in_percent
from lowrank_train.report.published_tables import GLUE_PAPERS
from lowrank_train.report.runs import RunRecord, shown

Metric = tuple[str, str, str]  # task, split, name

NOT_SETTINGS = ("seed", "trainer.log_every_steps", "trainer.keep_checkpoints", "trainer.save_every_steps")


@dataclass(frozen=True)
class Cell:
    """Runs of one strategy on one task that differ in their seed alone."""

    runs: list[RunRecord]
    tried: int  # settings among which this one has the best median

    @property
    def lr(self) -> str:
        return shown(self.runs[0].settings.get("optim.lr"))


def glue_report(runs: Sequence[RunRecord], paper: str | None) -> list[str]:
    """The table for the last and for the best evaluation, what its cells are, and what was published."""
    done = [run for run in runs if run.result is not None]
    rows = by_strategy(done)
    lines = [f"not finished: {run.path}" for run in runs if run.result is None]
    if not rows:
        return lines
    metrics = list(dict.fromkeys(metric for run in done for metric in metrics_of(run)))
    metrics.sort(key=lambda metric: metric[0])
    for key, title in (("metrics", "last evaluation"), ("best_metrics", "best evaluation")):
        lines += ["", f"GLUE, {title}, in percent:", *table(rows, metrics, key)]
    lines += ["", "a cell: the median over seeds, [lowest, highest] and their number where there are several"]
    lines += ["best: the evaluation of each run with the highest " + best_words(done)]
    tasks = sorted({task for task, _, _ in metrics})
    if len(tasks) > 1:
        firsts = ", ".join(column(first_of(done, task)) for task in tasks)
        lines.append(f"mean: of {firsts}; given where a row has all {len(tasks)}")
    for label, cells in rows.items():
        for task, cell in sorted(cells.items()):
            tried = f", best median of {cell.tried} settings" if cell.tried > 1 else ""
            lines.append(f"  {label}, {task}: lr {cell.lr}{tried}; {', '.join(str(run.path) for run in cell.runs)}")
    return lines if paper is None else [*lines, "", *beside(rows, paper)]


def by_strategy(runs: Sequence[RunRecord]) -> dict[str, dict[str, Cell]]:
    """Label of a strategy -> task -> its runs under the best of the settings that were tried."""
    found: dict[str, dict[str, dict[str, list[RunRecord]]]] = {}
    for run in runs:
        same = str(sorted((key, shown(value)) for key, value in run.settings.items() if counts(key)))
        found.setdefault(label_of(run), {}).setdefault(task_of(run), {}).setdefault(same, []).append(run)
    return {
        label: {task: Cell(max(kinds.values(), key=median_score), len(kinds)) for task, kinds in sorted(tasks.items())}
        for label, tasks in sorted(found.items())
    }


def counts(key: str) -> bool:
    """Whether runs that differ in this key were made under different settings."""
    return key.startswith(("model.", "data.", "strategy.", "precision.", "optim.", "trainer.")) and (
        key not in NOT_SETTINGS
    )


def task_of(run: RunRecord) -> str:
    """The hub's name of its task."""
    return str(run.settings["data.task"])


def rank_of(run: RunRecord) -> int | None:
    """Of the subspace, or of the layers."""
    rank = run.settings.get("strategy.subspace.rank", run.settings.get("strategy.weights.rank"))
    return rank if isinstance(rank, int) else None


def label_of(run: RunRecord) -> str:
    """Strategy, its rank, the model, and a precision that is not plain."""
    rank, precision = rank_of(run), run.settings.get("precision.name")
    words = [shown(run.settings["strategy.name"]), *([f"r{rank}"] if rank else []), shown(run.settings["model.name"])]
    return " ".join([*words, *([] if precision == "fp32" else [shown(precision)])])


def result_of(run: RunRecord) -> dict[str, Any]:
    """Of a finished run."""
    assert run.result is not None, "only finished runs are tabulated"
    return run.result


def metrics_of(run: RunRecord) -> Iterator[Metric]:
    """Every official metric that was found."""
    for split, values in result_of(run)["metrics"].items():
        for name in values:
            yield task_of(run), split, name


def first_of(runs: Sequence[RunRecord], task: str) -> Metric:
    """The split and metric by which the task's best evaluation is chosen."""
    split, name = next(result_of(run)["best_by"] for run in runs if task_of(run) == task)
    return task, split, name


def best_words(runs: Sequence[RunRecord]) -> str:
    """What the best of each task is chosen by."""
    tasks = sorted({task_of(run) for run in runs})
    return ", ".join(column(first_of(runs, task)) for task in tasks)


def median_score(runs: Sequence[RunRecord]) -> float:
    """Of the best evaluations, by the task's first metric."""
    metric = first_of(runs, task_of(runs[0]))
    return statistics.median(values(runs, metric, "best_metrics") or [float("-inf")])


def values(runs: Sequence[RunRecord], metric: Metric, key: str) -> list[float]:
    """The metric of every run in which it is defined."""
    _, split, name = metric
    found = [result_of(run)[key].get(split, {}).get(name) for run in runs]
    return [float(value) for value in found if value is not None]


def column(metric: Metric) -> str:
    """`mrpc F1`, `mnli matched accuracy`."""
    task, split, name = metric
    part = split.removeprefix("validation").lstrip("_")
    return " ".join([task, *([part] if part else []), NAMES[name]])


def table(rows: dict[str, dict[str, Cell]], metrics: Sequence[Metric], key: str) -> list[str]:
    """Columns of text."""
    tasks = sorted({task for task, _, _ in metrics})
    averaged = len(tasks) > 1
    cells = [["strategy", *(column(metric) for metric in metrics), *(["mean"] if averaged else [])]]
    for label, found in rows.items():
        row = [label]
        for metric in metrics:
            cell = found.get(metric[0])
            row.append("-" if cell is None else spread(values(cell.runs, metric, key)))
        if averaged:
            firsts = [
                values(cell.runs, first_of(cell.runs, task), key)
                for task in tasks
                if (cell := found.get(task)) is not None
            ]
            whole = len(firsts) == len(tasks) and all(firsts)
            row.append(in_percent(statistics.mean(map(statistics.median, firsts))) if whole else "-")
        cells.append(row)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]


def spread(found: Sequence[float]) -> str:
    """The median, and the range of several."""
    if not found:
        return "-"
    middle = in_percent(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} [{in_percent(min(found))}, {in_percent(max(found))}] x{len(found)}"


def beside(rows: dict[str, dict[str, Cell]], paper: str) -> list[str]:
    """What a paper printed for the same strategy, rank and task, beside our metrics of that task."""
    published = load_container(GLUE_PAPERS / f"{paper}.yaml")
    lines = [
        f"beside {paper}: {published['title']} ({published['source']}), for model {published['model']}",
        f"  its average: {published['average']}",
        f"  evidence: {published['evidence']}",
        *(f"  note: {note}" for note in published["notes"]),
    ]
    for label, cells in rows.items():
        one = next(iter(cells.values())).runs[0]
        name, rank, model = one.settings["strategy.name"], rank_of(one), one.settings["model.name"]
        figure = next(
            (f for f in published["figures"] if f["strategy"] == name and f.get("rank") in (None, rank)), None
        )
        if figure is None or model != published["model"]:
            lines.append(f"  {label}: no figure; it has {', '.join(figure_name(f) for f in published['figures'])}")
            continue
        lines.append(f"  {label}: average {figure['average']:.2f} published")
        for task, cell in cells.items():
            ours = ", ".join(
                f"{column(metric).partition(' ')[2]} {spread(values(cell.runs, metric, 'best_metrics'))}"
                for metric in dict.fromkeys(metric for run in cell.runs for metric in metrics_of(run))
            )
            theirs = f"{figure[task]:.2f} published" if task in figure else "none published"
            lines.append(f"    {task}: {theirs}; ours, best evaluation: {ours}")
    return lines


def figure_name(figure: dict[str, Any]) -> str:
    """`galore r4`."""
    return " ".join([figure["strategy"], *([f"r{figure['rank']}"] if "rank" in figure else [])])


def write_glue(runs: Sequence[RunRecord], lines: Sequence[str], out: Path) -> list[Path]:
    """glue.txt with what was said, and glue.csv with a row for every metric of every run."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["folder", "strategy", "rank", "model", "precision", "task", "seed", "lr", "split", "metric",
                     "last", "best", "best_step", "steps"])  # fmt: skip
    for run in runs:
        if run.result is None:
            continue
        keys = ("precision.name", "data.task", "seed", "optim.lr")
        for _, split, name in metrics_of(run):
            writer.writerow([
                run.path, run.settings["strategy.name"], rank_of(run), run.settings["model.name"],
                *(shown(run.settings.get(key)) for key in keys), split, name, run.result["metrics"][split][name],
                run.result["best_metrics"][split][name], run.result["best_step"], run.result["steps"],
            ])  # fmt: skip
    (out / "glue.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "glue.csv").write_text(file.getvalue(), encoding="utf-8")
    return [out / "glue.txt", out / "glue.csv"]
