"""The doctor's lines about packages: what is missing, what is older than was tested, and what an extra gives."""

from __future__ import annotations

import importlib.metadata

import pytest

from lowrank_train.config.schema import RunConfig
from lowrank_train.doctor import installation
from lowrank_train.doctor.finding import Finding


@pytest.mark.parametrize(
    ("version", "spec", "inside"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0.dev20261101", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("2.11", ">=2.11,<2.14", True),
        ("1.3.2", ">=1.3.2,<1.4", True),
        ("6.0.1", ">=6", True),
        ("9", "", True),
    ],
)
def test_ranges(version: str, spec: str, inside: bool) -> None:
    assert installation.within(version, spec) is inside


def test_dependencies_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lightning": "2.6.1", "rich": "12.9", "torch": "2.13", "wandb": "0.20"}
    needs = ["torch>=2.11,<2.14", "lightning<2.7,>=2.6", "rich>=13", "psutil>=5.9", 'wandb>=0.19; extra == "wandb"']

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    assert installation.requirements() == {
        "torch": ">=2.11,<2.14", "lightning": ">=2.6,<2.7", "rich": ">=13", "psutil": ">=5.9"
    }  # fmt: skip
    old, missing, rest = installation.packages(RunConfig())
    assert (old.verdict, old.fix) == ("note", "pip install 'rich>=13'")
    assert (missing.verdict, missing.found) == ("fault", "psutil is not installed")
    assert rest.found.startswith("1 of 3 ")
    assert list(installation.extras(RunConfig())) == [Finding("wandb", "ok", "0.20 (logger=wandb)")]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: version(name))
    assert [found.verdict for found in installation.packages(RunConfig())] == [
        "note"
    ]  # run from a folder, not installed
