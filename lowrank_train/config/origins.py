"""Where did a key come from: the command line, or which line of which file?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_train.config import paths
from lowrank_train.config.paths import RECIPE_GROUP, shown, until_changed
from lowrank_train.config.words import Words


class Origins:
    """Looks a dotted key up in what the configuration was made of; files are read only when asked."""

    def __init__(self, words: Words, selected: Mapping[Any, Any], base: Path | None = None) -> None:
        """`selected`: group -> choice, as Hydra took them; `base`: the configuration of a run that was started from."""
        self.words = words
        self.selected = {str(group): choice for group, choice in selected.items() if isinstance(choice, str)}
        self.base = base

    def of(self, key: str) -> str:
        """`command line`, `recipes/x.yaml, line 12`, or an empty text where the key is a default."""
        if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name, _ in self.words.values):
            return "command line"
        for path, package in self._files():
            line = _line(path, package, key)
            if line:
                return f"{shown(path)}, line {line}"
        return ""

    def _files(self) -> Iterator[tuple[Path, str]]:
        """Files with the dotted prefix of their keys, those that win first."""
        if RECIPE_GROUP in self.selected:
            yield from _with_parents(paths.RECIPES / f"{self.selected[RECIPE_GROUP]}.yaml", "")
        for group, choice in sorted(self.selected.items(), key=lambda item: -item[0].count("/")):
            if group != RECIPE_GROUP and not group.startswith("hydra"):
                yield from _with_parents(paths.CONF / group / f"{choice}.yaml", group.replace("/", "."))
        if self.base is not None:
            yield self.base, ""


def _with_parents(path: Path, package: str) -> Iterator[tuple[Path, str]]:
    """The file and those of its folder that it builds on by its defaults list."""
    if not path.is_file():
        return
    yield path, package
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"^\s*-\s+(?:/recipe/)?(\w+)\s*$", text.partition("defaults:")[2], flags=re.MULTILINE):
        parent = path.parent / f"{name}.yaml"
        if name != "_self_" and parent != path:
            yield from _with_parents(parent, package)


def _line(path: Path, package: str, key: str) -> int | None:
    """The line on which a file sets a key or the node it lies in whole; None where it does not."""
    import yaml

    if package:
        if not key.startswith(f"{package}."):
            return None
        key = key.removeprefix(f"{package}.")
    node = _nodes(path)
    line = None
    for word in key.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((name, value) for name, value in entries if name.value == word), None)
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line


@until_changed
def _nodes(path: Path) -> Any:
    """The nodes of a file, which know their lines."""
    import yaml

    return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
