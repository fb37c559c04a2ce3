"""What the support page says runs: read off docs/support.md, which tests/test_support.py holds against the checks."""

from __future__ import annotations

from pathlib import Path

from lowrank_train.support_table import LETTERS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"


def yeses(parallelism: str) -> list[tuple[str, str]]:
    """Every (strategy, moment of stepping) that runs so, with state in float32."""
    lines = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    names = [name.strip("| ") for name in lines[0]]
    column = names.index(parallelism)
    moments = {letter: moment for moment, letter in LETTERS.items()}
    found = [(line[0].strip("| "), line[column].split()[0]) for line in lines[2:]]
    return [(name, moments[letter]) for name, letters in found if letters != "-" for letter in letters]
