"""Published figures (papers/*.yaml) set beside ours: their source, their formula, and what differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lowrank_train.config.errors import UserError
from lowrank_train.config.files import load_container
from lowrank_train.config.values import did_you_mean
from lowrank_train.report.runs import RunRecord, shown
from lowrank_train.report.units import format_count

PAPERS = Path(__file__).with_name("papers")
GLUE_PAPERS = PAPERS / "glue"  # tables of another form: report/glue_table.py
GB = 1e9
UNKNOWN = "unknown"  # the value of a setting of the table that is not known of one of its figures
FORMULAS = {
    "papers": ("papers_val_perplexity", "by the papers' formula"),
    "token-weighted": ("val_perplexity", "token-weighted"),
}
"""Which of our figures follows the formula of a table."""


@dataclass(frozen=True)
class Figure:
    """One cell of a table: what was published for a strategy and a model."""

    strategy: str
    model: str
    perplexity: float
    as_printed: str  # a perplexity, or the loss it is the exponential of
    memory: str | None
    label: str  # what sets it apart from other figures of the same strategy and model
    settings: dict[str, Any]  # dotted key -> value, as the paper had it


@dataclass(frozen=True)
class PublishedTable:
    """A table of a paper."""

    name: str
    title: str
    source: str
    formula: str
    ours: Literal["papers", "token-weighted"]
    evidence: str
    notes: list[str]
    figures: list[Figure]


def table_names() -> list[str]:
    """What `paper=` takes."""
    return sorted(path.stem for path in PAPERS.glob("*.yaml"))


def glue_table_names() -> list[str]:
    """What `paper=` takes for runs on GLUE."""
    return sorted(path.stem for path in GLUE_PAPERS.glob("*.yaml"))


@cache
def read_table(name: str) -> PublishedTable:
    """UserError, with what was probably meant, for a name that is none of the tables."""
    names = table_names()
    known = [*names, *glue_table_names()]
    if name not in names:
        raise UserError(
            f"paper={name}: there is no such table{did_you_mean(name, known) or '.'} There are: {', '.join(known)}"
        )
    found = load_container(PAPERS / f"{name}.yaml")
    figures = [
        _figure(cell, {**found["settings"], **found["models"].get(cell["model"], {})}) for cell in found["figures"]
    ]
    return PublishedTable(name, **{key: found[key] for key in ("title", "source", "formula", "ours", "evidence",
                                                               "notes")}, figures=figures)  # fmt: skip


def _figure(cell: dict[str, Any], settings: dict[str, Any]) -> Figure:
    loss, of_the_cell = cell.get("loss"), {key: value for key, value in cell.items() if "." in key}
    return Figure(
        strategy=cell["strategy"],
        model=cell["model"],
        perplexity=cell["perplexity"] if loss is None else math.exp(loss),
        as_printed=f"{cell['perplexity']:.2f}" if loss is None else f"{math.exp(loss):.2f} (loss {loss:.2f})",
        memory=cell.get("memory"),
        label=cell.get("label", ""),
        settings={key: value for key, value in {**settings, **of_the_cell}.items() if value != UNKNOWN},
    )


def beside_published(runs: list[RunRecord], table: PublishedTable) -> list[str]:
    """Ours and theirs for each run the table has a figure for, and a line for each it has none for."""
    lines = [
        f"beside {table.name}: {table.title} ({table.source})",
        f"  their formula: {table.formula}; of ours, what is {FORMULAS[table.ours][1]} goes with it",
        f"  evidence: {table.evidence}",
        *(f"  note: {note}" for note in table.notes),
    ]
    for number, run in enumerate(runs, 1):
        lines += ["", *_beside(number, run, table)]
    return lines


def _beside(number: int, run: RunRecord, table: PublishedTable) -> Iterator[str]:
    strategy, model = run.settings.get("strategy.name"), run.settings.get("model.name")
    yield f"#{number} {strategy} on {model}: {_ours(run, table)}"
    figures = [figure for figure in table.figures if (figure.strategy, figure.model) == (strategy, model)]
    for figure in figures:
        memory = f", memory {figure.memory}" if figure.memory else ""
        ratio = _ratio(run, figure, table)
        yield f"  published: {figure.as_printed}{f' ({figure.label})' if figure.label else ''}{memory}{ratio}"
        yield from (f"    {line}" for line in differences(run, figure))
    if not figures:
        yield f"  no figure of this table is for {strategy} on {model}; it has {_what_there_is(table, strategy, model)}"


def _ours(run: RunRecord, table: PublishedTable) -> str:
    result = run.result
    if result is None:
        return "not finished" + ("" if run.perplexity is None else f"; so far {run.perplexity:.2f}, token-weighted")
    told = [f"{result[key]:.2f} {words}" for key, words in FORMULAS.values()]
    if table.ours == "token-weighted":
        told.reverse()
    held = f"; weights and state {(result['weights_bytes'] + (run.state_bytes or 0)) / GB:.3f} GB"
    return ", ".join(told) + (held if "weights_bytes" in result else "")


def _ratio(run: RunRecord, figure: Figure, table: PublishedTable) -> str:
    if run.result is None:
        return ""
    share = float(run.result[FORMULAS[table.ours][0]]) / figure.perplexity - 1
    return f"; ours is {abs(share):.1%} {'higher' if share > 0 else 'lower'}"


def differences(run: RunRecord, figure: Figure) -> list[str]:
    """The settings that are known of a published run and that ours does not share."""
    found = []
    for key, theirs in figure.settings.items():
        ours = rows_of_an_update(run.settings) if key == "trainer.total_batch_size" else run.settings.get(key)
        if ours != theirs:
            found.append(f"{key}: {shown(ours)} here, {shown(theirs)} there")
    steps, rows, length = (figure.settings.get(key) for key in ("trainer.steps", "trainer.total_batch_size",
                                                                "data.seq_len"))  # fmt: skip
    if steps and rows and length and run.result is not None:
        positions = steps * rows * length
        if positions != run.result.get("positions"):
            here = format_count(run.result.get("positions", 0))
            found.append(f"positions, padding counted: {here} here, {format_count(positions)} there")
    return found or ["no known setting differs"]


def rows_of_an_update(settings: dict[str, Any]) -> int:
    """Over all devices and micro-batches."""
    given = settings.get("trainer.total_batch_size")
    if given is not None:
        return int(given)
    return int(settings["trainer.batch_size"] * settings["trainer.devices"] * settings["trainer.num_nodes"])


def _what_there_is(table: PublishedTable, strategy: Any, model: Any) -> str:
    """The models it has for the strategy, or the strategies it has for the model, or all of both."""
    models = list(dict.fromkeys(figure.model for figure in table.figures if figure.strategy == strategy))
    if models:
        return f"{strategy} on {', '.join(models)}"
    strategies = list(dict.fromkeys(figure.strategy for figure in table.figures if figure.model == model))
    if strategies:
        return f"{', '.join(strategies)} on {model}"
    return (
        f"{', '.join(dict.fromkeys(figure.strategy for figure in table.figures))} on "
        f"{', '.join(dict.fromkeys(figure.model for figure in table.figures))}"
    )
