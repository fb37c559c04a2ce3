"""Learning-rate schedules against the recorded multipliers of the training scripts of relora, GaLore and SLTrain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowrank_train
from lowrank_train.optim.schedule import multiplier

TOLERANCE = 1e-12  # a few float64 roundings of numbers up to 1
REPOS = ("relora", "GaLore", "SLTrain")


def recorded(folder: Path, name: str, repo: str) -> tuple[dict[str, Any], np.ndarray]:
    """The settings, and the multiplier of every update and of the one past the end, which those scripts make too."""
    settings = json.loads((folder / "schedules_open.json").read_text(encoding="utf-8"))["settings"][name]
    with np.load(folder / "schedules_open.npz") as arrays:
        return settings, arrays[f"{name}:{repo}"]


@pytest.mark.parametrize("repo", REPOS)
@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_cycles", "restarts"])
def test_published_schedules(reference_data: Path, name: str, repo: Any) -> None:
    settings, theirs = recorded(reference_data, name, repo)
    ours = lowrank_train.schedule(repo=repo, **settings)
    assert theirs.shape == (1001,)
    np.testing.assert_allclose([ours(step) for step in range(1001)], theirs, rtol=0, atol=TOLERANCE)


def test_every_recorded_array_is_among_them(reference_data: Path) -> None:
    with np.load(reference_data / "schedules_open.npz") as arrays:
        names = {tuple(key.split(":")) for key in arrays.files}
    assert names == {(name, repo) for name in ("linear", "cosine", "cosine_cycles", "restarts") for repo in REPOS}


@pytest.mark.parametrize(
    ("name", "schedule", "keys"),
    [
        ("cosine", "cosine", {"min_lr_ratio": 0.1}),
        ("linear", "linear", {"min_lr_ratio": 0.0}),  # the published line goes to 0 whatever its min_lr_ratio says
        ("restarts", "cosine_restarts", {"min_lr_ratio": 0.1, "cycle_steps": 200, "restart_warmup_steps": 10}),
    ],
)
def test_schedules_of_a_run(reference_data: Path, name: str, schedule: Any, keys: dict[str, Any]) -> None:
    """The 1000 updates of a run; past the end the published cosine starts a new cycle, ours stays where it is."""
    settings, theirs = recorded(reference_data, name, "relora")
    warmup = settings["warmup_steps"]
    ours = [multiplier(schedule, step, warmup_steps=warmup, steps=1000, **keys) for step in range(1000)]
    np.testing.assert_allclose(ours, theirs[:1000], rtol=0, atol=TOLERANCE)
