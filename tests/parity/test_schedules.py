"""Learning-rate schedules against the recorded multipliers of GaLore's training_utils.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowrank_train.optim.schedule import multiplier


@pytest.mark.parametrize(("schedule", "min_lr_ratio"), [("cosine", 0.1), ("linear", 0.0)])
def test_against_the_published_schedule(reference_data: Path, schedule: str, min_lr_ratio: float) -> None:
    """Every update of the run; the published line goes to 0 whatever its min_lr_ratio says."""
    with np.load(reference_data / "schedules_open.npz") as recorded:
        theirs = recorded[f"{schedule}:GaLore"][:1000]  # past the end the published cosine starts a new cycle
    ours = [
        multiplier(schedule, step, warmup_steps=100, steps=1000, min_lr_ratio=min_lr_ratio)  # type: ignore[arg-type]
        for step in range(1000)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
