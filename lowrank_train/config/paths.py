"""Where the YAML of the project lies, and which choices each group has, read off the folders."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lowrank_train.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
RECIPES = ROOT / "recipes"
RECIPE_GROUP = "recipe"

Read = TypeVar("Read")


def require_conf() -> None:
    """Stop with the way out where the package was installed without the YAML beside it."""
    if not (CONF / "config.yaml").is_file():
        raise UserError(f"{CONF / 'config.yaml'} is missing: run from a checkout installed with `pip install -e .`.")


def group_choices() -> dict[str, list[str]]:
    """The choices of every group: `strategy/subspace` -> [randomized, svd]; recipes are the group `recipe`."""
    choices = {RECIPE_GROUP: [recipe_name(path) for path in recipe_files()]}
    for folder, below, files in os.walk(CONF):
        below.sort()
        names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
        if names and Path(folder) != CONF:
            choices[Path(folder).relative_to(CONF).as_posix()] = names
    return choices


def recipe_files() -> list[Path]:
    """Every recipe, in the order of their names."""
    return sorted(RECIPES.rglob("*.yaml"))


def recipe_name(path: Path) -> str:
    """What `recipe=` calls a file: `galore_60m`, or `mine/x` for one in a folder."""
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def shown(path: Path) -> str:
    """The path as a reader of the project would write it: relative to its root where it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def version_of_yaml() -> str:
    """A text that is another one as soon as any file of conf/ or recipes/ is written, comes or goes."""
    files = sorted([*_versions(CONF), *_versions(RECIPES)])
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _versions(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Path, time of the last change and size of every YAML file below a folder."""
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _versions(Path(entry.path))
            elif entry.name.endswith(".yaml"):
                status = entry.stat()
                yield entry.path, status.st_mtime_ns, status.st_size


def until_changed(read: Callable[[Path], Read]) -> Callable[[Path], Read]:
    """The function of a file, called anew only once the file has changed; what it gives is not to be changed."""
    kept: dict[Path, tuple[tuple[int, int], Read]] = {}

    @functools.wraps(read)
    def current(path: Path) -> Read:
        status = path.stat()
        version = status.st_mtime_ns, status.st_size
        if path not in kept or kept[path][0] != version:
            kept[path] = version, read(path)
        return kept[path][1]

    return current
