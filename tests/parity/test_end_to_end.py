"""A LLaMA of 4 layers trained for 200 updates on WikiText-2, against recorded runs of the published code.

One run, and half of another; `python -m benchmarks.end_to_end` has all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.end_to_end import RUNS, train


@pytest.mark.slow
@pytest.mark.parametrize(("name", "updates"), [("adamw", 100), ("galore_adamw", 200)])
def test_evaluation_loss(reference_data: Path, name: str, updates: int) -> None:
    folder = reference_data / "e2e"
    run = next(run for run in RUNS if run.recorded == name)
    settings = run.settings(folder)
    losses, evaluation = train(folder, run, published=True, updates=updates)
    assert losses[:5] == pytest.approx(settings["losses"][:5], abs=2e-3), "not the same model, data or schedule"
    assert evaluation == pytest.approx(settings["eval_losses"][str(updates)], abs=0.02)
