"""Runs with int8 weights: they resume to the last bit, count what rounding loses, and export what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_train.checkpoint import checkpoint_folder
from lowrank_train.cli import main
from tests.train.conftest import differences, rows_of, saved
from tests.train.processes import train_on_two

Run = Callable[..., Path]
ODD = "model.intermediate_size=75"  # no matrix of the MLP has a whole number of groups


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy=q_galore", "strategy.subspace.rank=8", "strategy.subspace.every=5", "trainer.total_batch_size=8"],
        ["strategy=q_apollo_mini", "strategy.when=in_backward", "optim.grad_clip=null"],
        ["strategy=full"],
    ],
    ids=lambda words: words[0],
)
def test_a_run_goes_on_to_the_same_bits(run: Run, settings: list[str]) -> None:
    words = [*settings, ODD, "precision=int8", "trainer.keep_checkpoints=4"]
    whole = run("whole", *words)
    again = run("again", *words, f"resume={checkpoint_folder(whole / 'checkpoints', 6)}")
    weights = saved(whole)["weights"]
    codes = {name: tensor for name, tensor in weights.items() if name.endswith("proj.weight.codes")}
    assert len(codes) == 7 and {tensor.dtype for tensor in codes.values()} == {torch.uint8}
    assert not any(name.endswith("proj.weight") for name in weights)
    assert differences(weights, saved(again)["weights"]) == []
    assert differences(saved(whole)["state"]["optimizer_states"], saved(again)["state"]["optimizer_states"]) == []
    assert rows_of(again)[6:] == rows_of(whole)[6:]


def test_two_processes_go_on_to_the_same_bits(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """DDP sends every process the weights of the first, which must not encode them anew."""
    settings = [ODD, "precision=int8", "data.packing=pad", "trainer.steps=6", "trainer.eval_every_steps=0"]
    settings += ["trainer.keep_checkpoints=2", "trainer.threads=1"]
    train_on_two(tiny("whole", *settings), tmp_path)
    train_on_two(
        tiny("again", *settings, f"resume={checkpoint_folder(tmp_path / 'whole' / 'checkpoints', 3)}"), tmp_path
    )
    whole, again = (saved(tmp_path / name) for name in ("whole", "again"))
    assert differences(whole["weights"], again["weights"]) == []
    assert differences(whole["state"]["optimizer_states"], again["state"]["optimizer_states"]) == []


def test_export_and_lost_updates(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written are plain matrices, whose logits are those of the run."""
    folder = run("run", "precision=int8", "precision.count_lost_updates=true", ODD, "trainer.steps=4")
    lost = [float(row["optim/lost_updates_pct"]) for row in rows_of(folder)[1:]]  # the first has a rate of 0
    assert all(0 < share < 100 for share in lost)
    assert main(["export", f"run={folder}", f"out={tmp_path / 'hub'}"]) == 0
    assert "token ids are equal" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype="auto")
    assert {param.dtype for param in exported.parameters()} == {torch.bfloat16}
    assert main(["evaluate", f"run={folder}"]) == 0
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["precision.compute=32-true", "precision.weights=float32"], "precision.int8_group=256"),
        (["precision.rounding=compensated"], "more than bfloat16 takes"),
        (["strategy=sltrain"], "in another form"),
        (["precision.int8_group=0"], "must be at least 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_contradicts_itself_is_refused(
    tiny: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert main(tiny("refused", "precision=int8", *words)) == 2
    assert reason in capsys.readouterr().err
