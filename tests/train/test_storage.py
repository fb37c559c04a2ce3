"""State in 4 bits in a real run: resumed bit for bit, and on two processes as on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_train.checkpoint import checkpoint_folder
from tests.train.conftest import differences, rows_of, saved
from tests.train.processes import train_on_two

Run = Callable[..., Path]
Q4 = ["strategy/storage=q4", "strategy.storage.min_elements=64", "strategy.storage.block_q4=32"]
GALORE = ["strategy=galore", "strategy.subspace.rank=4", "strategy.subspace.every=4", "strategy.storage.basis=q4", *Q4]


@pytest.mark.parametrize("when", ["project_in_backward", "in_backward"])
def test_resumes_exactly(run: Run, when: str) -> None:
    """In the middle of an interval, at its end and after it; with clipping and micro-batches where they go together."""
    more = ["optim.grad_clip=null"] if when == "in_backward" else ["trainer.total_batch_size=8", "optim.grad_clip=null"]
    settings = [*GALORE, f"strategy.when={when}", *more]
    whole = run("whole", *settings, "trainer.save_every_steps=1", "trainer.keep_checkpoints=12")
    for step in (3, 4, 5):
        start = checkpoint_folder(whole / "checkpoints", step)
        again = run(f"from_{step}", *settings, f"resume={start}")
        assert differences(saved(whole)["weights"], saved(again)["weights"]) == []
        assert differences(saved(whole)["state"]["optimizer_states"], saved(again)["state"]["optimizer_states"]) == []
        assert rows_of(again)[step:] == rows_of(whole)[step:]


def test_two_processes_are_one(run: Run, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """DDP over gloo. The order of the sums moves a few numbers over the middle of two codes: 1e-3 of the loss."""
    settings = [*GALORE, "data.packing=pad", "trainer.total_batch_size=8"]
    one = run("one", *settings, "trainer.batch_size=8")
    train_on_two(tiny("two", *settings), tmp_path)
    for a, b in zip(rows_of(one), rows_of(tmp_path / "two"), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-3)
    for folder in (one, tmp_path / "two"):
        states = saved(folder)["state"]["optimizer_states"][0]["state"].values()
        dtypes = {key.rpartition(".")[2]: value.dtype for state in states for key, value in state.items() if "." in key
                  and isinstance(value, torch.Tensor)}  # fmt: skip
        assert dtypes["q4"] == dtypes["codes"] == torch.uint8 and dtypes["scale"] == torch.float32
