"""The weights of the best evaluation of any run: which they are, where they lie, and that they survive a resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_train.checkpoint import checkpoint_folder, checkpoint_folders, checkpoint_step, load_weights, read_manifest
from lowrank_train.cli import main
from tests.train.conftest import rows_of

Run = Callable[..., Path]
# A learning rate that grows until the loss rises again, and an evaluation every three updates.
WORDS = ["trainer.keep_best=true", "trainer.eval_every_steps=3", "trainer.keep_checkpoints=9", "optim.lr=0.3",
         "optim.warmup_steps=9", "trainer.steps=9"]  # fmt: skip


def losses_of(folder: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["val/loss"]) for row in rows_of(folder) if row["val/loss"]}


def test_the_lowest_loss_is_kept_opened_and_found_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("kept", *WORDS)
    losses, result = losses_of(folder), json.loads((folder / "result.json").read_text(encoding="utf-8"))
    best = min(losses, key=lambda step: losses[step])
    assert best < 9, "the loss was meant to rise again"
    assert (result["best_step"], result["best_val_loss"], result["steps"]) == (best, losses[best], 9)
    [kept] = checkpoint_folders(folder / "checkpoints", "best")
    assert checkpoint_step(kept) == best
    same = load_weights(kept, read_manifest(kept))
    step = checkpoint_folder(folder / "checkpoints", best)
    assert all(torch.equal(same[name], tensor) for name, tensor in load_weights(step, read_manifest(step)).items())
    for words, loss in (([], losses[9]), (["best=true"], losses[best])):
        assert main(["evaluate", f"run={folder}", *words]) == 0
        assert f"loss                  {loss:.5f} nats" in capsys.readouterr().out
    assert main(["train", f"resume={kept}", "run_name=x", f"output_dir={tmp_path}"]) == 2
    assert "holds weights alone" in capsys.readouterr().err

    # From the very checkpoint that is the best, as after an evaluation that a signal interrupted: it has its weights.
    (folder / "result.json").unlink()
    for found in (folder / "checkpoints").iterdir():
        if found != step:
            shutil.rmtree(found)
    assert run("kept", *WORDS) == folder
    assert losses_of(folder) == losses
    [again] = checkpoint_folders(folder / "checkpoints", "best")
    assert again.name == kept.name
    assert all(torch.equal(same[name], tensor) for name, tensor in load_weights(again, read_manifest(again)).items())


def test_it_is_kept_where_asked_for(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("last", "trainer.steps=4", "optim.warmup_steps=1")
    assert not checkpoint_folders(folder / "checkpoints", "best")
    assert main(["evaluate", f"run={folder}", "best=true"]) == 2
    assert "train with trainer.keep_best=true" in capsys.readouterr().err
