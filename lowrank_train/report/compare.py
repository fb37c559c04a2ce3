"""`lowrank compare RUN...`: runs side by side in a table, a CSV and pictures, and beside published figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.sweep_jobs import is_sweep_folder, run_folders
from lowrank_train.report.console import Console
from lowrank_train.report.glue_table import glue_report, write_glue
from lowrank_train.report.grouping import best_lines, difference_lines, grouped, rank, warnings
from lowrank_train.report.published_tables import PublishedTable, beside_published, glue_table_names, read_table
from lowrank_train.report.runs import BrokenRun, RunRecord, differing, read_run, shown
from lowrank_train.report.units import format_bytes, format_count, format_duration

DEFAULT_OUT = "compare"
UNKNOWN = "-"


def compare(config: RunConfig) -> int:
    """Compare `runs`, or those of sweeps, and write it into `out`; UserError where none of the folders can be read."""
    tables = tables_of(config.paper)
    if not config.runs:
        raise UserError("runs: name the run folders, as in `lowrank compare runs/*`")
    paths = [Path(name) for name in config.runs]
    runs, broken = readable([run for path in paths for run in (run_folders(path) if is_sweep_folder(path) else [path])])
    if not runs:
        raise UserError(broken)
    show(runs, broken, Path(config.out or DEFAULT_OUT), *tables)
    return 0


def compare_sweep(folders: list[Path], out: Path) -> None:
    """The comparison at the end of a sweep, into the sweep's folder; nothing where no job has begun to train.

    `paper=` of its jobs is set beside, as in `lowrank compare`.
    """
    runs, broken = readable(folders)
    if runs:
        show(runs, broken, out, *tables_of(runs[0].settings.get("paper")))


def tables_of(paper: str | None) -> tuple[PublishedTable | None, str | None]:
    """The published table for runs on text, or the name of one for GLUE. UserError for a name that is neither."""
    if paper is None or paper in glue_table_names():
        return None, paper
    return read_table(paper), None


def show(
    runs: list[RunRecord],
    broken: list[str],
    out: Path,
    published: PublishedTable | None,
    paper_of_glue: str | None,
) -> None:
    """Print the comparison and write its files; runs on GLUE tasks have a table of their own."""
    console = Console(None)
    for line in broken:
        console.warn(f"passed over: {line}")
    of_tasks, runs = [run for run in runs if run.is_glue], [run for run in runs if not run.is_glue]
    if of_tasks:
        lines = glue_report(of_tasks, paper_of_glue)
        console.say("\n".join(lines))
        make_folder(out)
        console.say(f"\nin {out}: {', '.join(path.name for path in write_glue(of_tasks, lines, out))}")
    if paper_of_glue is not None and not of_tasks:
        console.warn(f"paper={paper_of_glue}: is for runs on GLUE tasks, and here is none")
    if not runs:
        return
    console.show(rich_table(runs), "\n".join(plain_table(runs)))
    for line in warnings(runs):
        console.warn(line)
    said = remarks(runs) + ([] if published is None else ["", *beside_published(runs, published)])
    console.say("\n".join(said))
    text = [*plain_table(runs), "", *(f"warning: {line}" for line in warnings(runs)), *said]
    console.say(f"\nin {out}: {', '.join(path.name for path in write_files(runs, text, out))}")


def readable(paths: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """The runs, best first, and a line for each folder that holds none."""
    runs, broken = [], []
    for path in dict.fromkeys(paths):
        try:
            runs.append(read_run(path))
        except BrokenRun as error:
            broken.append(f"{path}: {error}")
    return sorted(runs, key=lambda run: (shown(run.settings.get("model.name")), rank(run))), broken


def write_files(runs: list[RunRecord], text: list[str], out: Path) -> list[Path]:
    """compare.txt with what was said, compare.csv and the pictures; gives their paths."""
    from lowrank_train.report.compare_plots import draw_all  # matplotlib is not for a table alone

    make_folder(out)
    (out / "compare.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    (out / "compare.csv").write_text(csv_text(runs), encoding="utf-8")
    return [out / "compare.txt", out / "compare.csv", *draw_all(grouped(runs), out)]


def make_folder(out: Path) -> None:
    """UserError where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be made a folder ({error.strerror})") from None


COLUMNS: dict[str, Callable[[RunRecord], str]] = {
    "strategy": lambda run: shown(run.settings.get("strategy.name")),
    "model": lambda run: shown(run.settings.get("model.name")),
    "tokens": lambda run: format_count(run.tokens),
    "perplexity": lambda run: UNKNOWN if run.perplexity is None else f"{run.perplexity:.2f}",
    "peak": lambda run: optional(run.peak_bytes, format_bytes),
    "planned": lambda run: optional(run.planned_peak_bytes, format_bytes),
    "state": lambda run: optional(run.state_bytes, format_bytes),
    "tokens/s": lambda run: optional(run.tokens_per_sec, lambda value: f"{value:,.0f}"),
    "h:mm:ss": lambda run: format_duration(run.seconds),
    "lr": lambda run: shown(run.settings.get("optim.lr")),
    "seed": lambda run: shown(run.settings.get("seed")),
    "steps": lambda run: f"{run.points[-1].step:,}" + ("" if run.finished else f" of {wanted_steps(run):,}"),
}
LEFT = ("strategy", "model", "steps")


def optional(value: Any, form: Callable[[Any], str]) -> str:
    """The value in words, or a dash."""
    return UNKNOWN if value is None else form(value)


def wanted_steps(run: RunRecord) -> int:
    """How far it is to go."""
    return int(run.settings.get("trainer.steps") or 0)


def cells(runs: list[RunRecord]) -> list[list[str]]:
    """The numbered rows below their header."""
    rows = [[f"#{number}", *(form(run) for form in COLUMNS.values())] for number, run in enumerate(runs, 1)]
    return [["", *COLUMNS], *rows]


def plain_table(runs: list[RunRecord]) -> list[str]:
    """Columns of text for files and pipes."""
    rows = cells(runs)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = [name in ("", *LEFT) for name in rows[0]]
    return [
        "  ".join(
            f"{cell:<{width}}" if is_left else f"{cell:>{width}}"
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def rich_table(runs: list[RunRecord]) -> Table:
    """The same for a terminal: the best finished run of all in bold, unfinished ones dim."""
    header, *rows = cells(runs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in header:
        table.add_column(name, justify="left" if name in ("", *LEFT) else "right", no_wrap=True)
    best = min(runs, key=rank)
    for run, row in zip(runs, rows, strict=True):
        style = "bold" if run is best and run.finished and len(runs) > 1 else "" if run.finished else "dim"
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def remarks(runs: list[RunRecord]) -> list[str]:
    """Which number is which folder, the best of each kind, the keys that differ, and what the columns are."""
    on_cpu = any(run.on_gpu is False for run in runs)
    peak = " of the whole process on a CPU, its libraries included" if on_cpu else ""
    return [
        *(f"#{number} {run.path}" + ("" if run.finished else " (not finished)") for number, run in enumerate(runs, 1)),
        *best_lines(grouped(runs)),
        *difference_lines(runs),
        f"peak: measured{peak}; planned: of the tensors, as `lowrank plan` finds it; perplexity: token-weighted",
    ]


def csv_text(runs: list[RunRecord]) -> str:
    """A row a run, numbers in full, and a column for each key in which they differ."""
    differences = differing(runs)
    file = io.StringIO()
    rows = [csv_row(run) | {key: shown(run.settings.get(key)) for key in differences} for run in runs]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def csv_row(run: RunRecord) -> dict[str, Any]:
    """What is known of one run; an empty cell is not known."""
    result = run.result or {}
    return {
        "run": run.name,
        "folder": str(run.path),
        "finished": str(run.finished).lower(),
        "strategy": run.settings.get("strategy.name"),
        "model": run.settings.get("model.name"),
        "precision": run.settings.get("precision.name"),
        "steps": run.points[-1].step,
        "tokens": run.tokens,
        "val_perplexity": run.perplexity,
        "papers_val_perplexity": result.get("papers_val_perplexity"),
        "peak_memory_bytes": run.peak_bytes,
        "planned_peak_bytes": run.planned_peak_bytes,
        "weights_bytes": result.get("weights_bytes"),
        "state_bytes": run.state_bytes,
        "tokens_per_sec": run.tokens_per_sec,
        "hours": run.seconds / 3600,
        "refresh_sec": result.get("refresh_sec"),
        "lr": run.settings.get("optim.lr"),
        "seed": run.settings.get("seed"),
        "commit": result.get("commit"),
        "data_fingerprint": result.get("data_fingerprint"),
        "tokenizer_fingerprint": result.get("tokenizer_fingerprint"),
        "device": result.get("hardware", {}).get("device"),
    }
