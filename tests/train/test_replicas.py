"""Devices with the whole model each, their projected gradients averaged: one run on one process, on two, on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from lowrank_train.train.machinery import leave_together
from tests.train.conftest import rows_of, saved

Words = Callable[..., list[str]]
Run = Callable[..., Path]

SETTINGS = [
    "strategy.when=project_in_backward", "optim.clip_norm_of=projected", "optim.schedule=constant",
    "data.packing=pad", "data.log_documents=true", "trainer.total_batch_size=16", "trainer.save_every_steps=4",
]  # fmt: skip
ONE = ["trainer.batch_size=8", "trainer.devices=1"]
TWO = ["trainer.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "trainer.reduce=projected"]


def test_a_run_moves_from_one_process_to_two_and_back(
    tiny: Words, run: Run, project_root: Path, tmp_path: Path
) -> None:
    """Two moves of the bases lie on either side of each change. 1e-5: float32 sums in another order."""
    alone = run("alone", *SETTINGS, *ONE)
    run("moved", *SETTINGS, *ONE, "trainer.steps=4")
    words = tiny("moved", *SETTINGS, *TWO, "trainer.steps=8")
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=project_root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "going on after step 4" in done.stdout and "averaged" not in done.stderr
    moved = run("moved", *SETTINGS, *ONE)
    for ours, theirs in zip(rows_of(moved), rows_of(alone), strict=True):
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
        for column in ("train/loss", "train/grad_norm_projected"):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-5)
    weights = [saved(folder)["weights"] for folder in (alone, moved)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weight - weights[1][name]).abs().max() < 1e-5 for name, weight in weights[0].items())
    seen = [sorted((folder / "documents.csv").read_text(encoding="utf-8").splitlines()) for folder in (alone, moved)]
    documents = [[line.rpartition(",")[2] for line in lines] for lines in seen]
    assert sorted(documents[0]) == sorted(documents[1])


def test_a_run_leaves_no_process_group_behind(tmp_path: Path) -> None:
    """Whose threads can abort the interpreter while it exits."""
    leave_together()  # alone there is none
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    leave_together()
    assert not dist.is_initialized()
