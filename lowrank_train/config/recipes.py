"""What recipes there are, read off the heads of their files as plain text, so that a list takes no time.

A head is the comment at the top of a recipe: a sentence, then `# key: value` lines, which may go on on lines indented
further.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_train.config.errors import UserError
from lowrank_train.config.paths import recipe_files, recipe_name
from lowrank_train.config.values import did_you_mean

FIELDS = ("model", "method", "data", "card", "command", "published", "counted", "measured", "source", "departures")
"""What every head says, in this order."""

LISTED = ("model", "method", "card", "published", "counted", "measured", "source")


@dataclass(frozen=True)
class Recipe:
    """The head of a recipe: its name, its sentence, and its facts by field."""

    name: str
    title: str
    facts: dict[str, str]


def read_head(path: Path) -> Recipe:
    """Parse the head of one file."""
    title: list[str] = []
    facts: dict[str, str] = {}
    last = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package") or not line.strip():
            continue
        if not line.startswith("#"):
            break
        found = re.match(r"# ([a-z]+): (.+)", line)
        if found:
            last = found[1]
            facts[last] = found[2].strip()
        elif last:
            facts[last] += f" {line.lstrip('# ').strip()}"
        else:
            title.append(line.lstrip("# ").strip())
    return Recipe(recipe_name(path), " ".join(title), facts)


def show_recipes(words: Sequence[str]) -> int:
    """Print the list of recipes, or the files of those named; those that only vary a listed one are not listed."""
    by_name = {recipe_name(path): path for path in recipe_files()}
    unknown = [word for word in words if word not in by_name]
    if unknown:
        listed = ", ".join(by_name)
        raise UserError(
            [
                f"{word}: there is no such recipe{did_you_mean(word, by_name) or '.'} Recipes: {listed}."
                for word in unknown
            ]
        )
    if words:
        print("\n".join(by_name[word].read_text(encoding="utf-8").rstrip() for word in words))
    else:
        heads = [read_head(path) for path in by_name.values()]
        print(table([head for head in heads if head.facts], shutil.get_terminal_size((120, 24)).columns))
    return 0


def table(recipes: Sequence[Recipe], width: int) -> str:
    """Columns of wrapped text, smallest model first; a cell ends at its first semicolon.

    The first three columns are as wide as they need; the others share what is left of `width` characters.
    """
    header = ["recipe", *LISTED]
    rows = [
        [recipe.name, *(recipe.facts.get(field, "").partition(";")[0] for field in LISTED)]
        for recipe in sorted(recipes, key=_by_size)
    ]
    fixed = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    share = max(14, (width - sum(fixed) - 2 * (len(header) - 1)) // (len(header) - 3))
    widths = [*fixed, *[share] * (len(header) - 3)]
    lines = []
    for row in [header, ["-" * size for size in widths], *rows]:
        cells = [textwrap.wrap(cell, size) or [""] for cell, size in zip(row, widths, strict=True)]
        for i in range(max(len(cell) for cell in cells)):
            parts = ((cell[i] if i < len(cell) else "").ljust(size) for cell, size in zip(cells, widths, strict=True))
            lines.append("  ".join(parts).rstrip())
    lines += [
        "",
        "counted: weights and optimizer state. `lowrank recipes NAME` prints a whole recipe with its evidence, and",
        "`python train.py recipe=NAME` runs it.",
    ]
    return "\n".join(lines)


def _by_size(recipe: Recipe) -> tuple[float, str]:
    """The model's number of parameters, as its name says it."""
    found = re.search(r"_(\d+)([mb])", recipe.facts.get("model", ""))
    return (int(found[1]) * {"m": 1e6, "b": 1e9}[found[2]] if found else 0.0), recipe.name
