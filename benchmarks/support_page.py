"""What runs on several devices, as `lowrank support` finds it, into docs/support.md and README.md.

.venv/bin/python -m benchmarks.support_page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_train.config.paths import group_choices
from lowrank_train.support import PARALLELISMS, Cell, support_of
from lowrank_train.support_table import LEGEND, Notes, grouped, markdown, rows, with_defaults

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
README = ROOT / "README.md"
BEGINS, ENDS = "<!-- support begins -->\n", "<!-- support ends -->\n"
HEAD = ("strategy", *PARALLELISMS, "state")


def found() -> list[Cell]:
    """Every combination of every strategy, as the command finds it."""
    return list(support_of(with_defaults([]), group_choices()["strategy"]))


def page(cells: Sequence[Cell]) -> str:
    """docs/support.md: a line for each strategy, and the reasons."""
    notes = Notes()
    lines = [HEAD, *((name, *texts) for name, texts in rows(cells, notes).items())]
    reasons = [f"{number}. {text}" for text, number in notes.numbers.items()]
    return "\n".join(
        [
            "# What runs on several devices",
            "",
            "Written by `python -m benchmarks.support_page` from the checks that refuse a run when it starts: "
            "`lowrank support` prints the same for any words.",
            "",
            *LEGEND,
            "",
            *markdown(lines),
            "",
            "Reasons:",
            "",
            *reasons,
            "",
        ]
    )


def block(cells: Sequence[Cell]) -> str:
    """The part of README.md between the marks: strategies that run alike share a line."""
    lines = [(", ".join(names), *texts) for texts, names in grouped(cells).items()]
    return "\n".join([*markdown([HEAD, *lines]), ""])


def write(cells: Sequence[Cell]) -> None:
    """The page, and the block in README.md."""
    PAGE.write_text(page(cells), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGINS)
    README.write_text(before + BEGINS + block(cells) + ENDS + rest.partition(ENDS)[2], encoding="utf-8")


if __name__ == "__main__":
    write(found())
