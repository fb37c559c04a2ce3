"""Runs whose bfloat16 weights lose no update: they resume exactly, and what is lost has its column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_train.checkpoint import checkpoint_folder
from tests.train.conftest import differences, rows_of, saved

Run = Callable[..., Path]
LOST = "optim/lost_updates_pct"


@pytest.mark.parametrize("strategy", ["galore", "full"])
@pytest.mark.parametrize("precision", ["bf16_sr", "bf16_kahan"])
def test_a_run_goes_on_to_the_same_bits(run: Run, precision: str, strategy: str) -> None:
    settings = [f"strategy={strategy}", f"precision={precision}", "trainer.keep_checkpoints=4"]
    whole = run("whole", *settings)
    again = run("again", *settings, f"resume={checkpoint_folder(whole / 'checkpoints', 6)}")
    assert {tensor.dtype for tensor in saved(whole)["weights"].values()} == {torch.bfloat16}
    assert differences(saved(whole)["weights"], saved(again)["weights"]) == []
    assert differences(saved(whole)["state"]["optimizer_states"], saved(again)["state"]["optimizer_states"]) == []
    assert rows_of(again)[6:] == rows_of(whole)[6:]


def test_lost_updates_are_a_column_where_wanted(run: Run) -> None:
    """At a rate of 1e-5, 2^-9 of weights of 0.005, rounding to the nearest loses the updates of larger ones.

    Of rows of the embedding whose tokens have not come the update is zero. Kahan's residues end at 2^-16 of a weight.
    """
    small = ["optim.lr=1e-5", "optim.warmup_steps=0", "trainer.steps=4"]
    silent = rows_of(run("silent", "precision=bf16", *small))
    assert {row[LOST] for row in silent} == {""}
    lost = {}
    for precision in ("bf16", "bf16_sr", "bf16_kahan"):
        rows = rows_of(run(precision, f"precision={precision}", "precision.count_lost_updates=true", *small))
        lost[precision] = [float(row[LOST]) for row in rows]
        if precision == "bf16":  # counting changes nothing else
            assert [row | {LOST: ""} for row in rows] == silent
    assert min(lost["bf16"]) > 40
    assert max(lost["bf16_kahan"]) < 1
    assert all(0 < one < other for one, other in zip(lost["bf16_sr"], lost["bf16"], strict=True))
