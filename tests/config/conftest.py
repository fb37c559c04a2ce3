"""A copy of the YAML that a test may spoil, and the faults that words of a command line have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_train.config import UserError, compose, paths


@pytest.fixture
def own_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of conf/ and recipes/ that `compose` reads instead of the project's."""
    for name in ("conf", "recipes"):
        shutil.copytree(paths.ROOT / name, tmp_path / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "CONF", tmp_path / "conf")
    monkeypatch.setattr(paths, "RECIPES", tmp_path / "recipes")
    return tmp_path


@pytest.fixture
def faults() -> Callable[..., list[str]]:
    """The faults of a command line; none when it is right."""

    def found(*words: str) -> list[str]:
        try:
            compose(words)
        except UserError as error:
            return error.faults
        return []

    return found
