"""The plan of the 7B recipe, as the command prints it, into docs/ and README.md.

.venv/bin/python -m benchmarks.plan_page
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from lowrank_train.cli import main

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("plan", "recipe=galore_7b_4090", "card=4090")
PAGE = ROOT / "docs" / "plan_galore_7b_4090.txt"
README = ROOT / "README.md"
BEGINS, ENDS = "<!-- plan begins -->\n", "<!-- plan ends -->\n"


def printed() -> str:
    """What the command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(WORDS)
    if code != 0:
        raise SystemExit(code)
    return out.getvalue()


def block(text: str) -> str:
    """The part of README.md between the marks."""
    return f"```text\n{text}```\n"


def write(text: str) -> None:
    """The page, and the block in README.md."""
    PAGE.write_text(text, encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGINS)
    README.write_text(before + BEGINS + block(text) + ENDS + rest.partition(ENDS)[2], encoding="utf-8")


if __name__ == "__main__":
    write(printed())
