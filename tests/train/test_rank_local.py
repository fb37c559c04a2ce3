"""Heads on the ranks of a real run: as in one process, resumed to the last bit, exported with all; others refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowrank_train.checkpoint import checkpoint_folder
from lowrank_train.cli import main
from lowrank_train.config import UserError, compose
from lowrank_train.nn.parallel_heads import FACTORS, ParallelHeadsLinear
from lowrank_train.train.rank_local import join_copies, rank_local_names, take_own_copy, take_places
from tests.train.conftest import differences, rows_of, saved
from tests.train.sharded_runs import train_all
from tests.two_processes import on_two

Run = Callable[..., Path]
# 11 updates: the last evaluation, the last checkpoint and the one of step 6 fall into the middle of a round.
LTE = [
    "strategy=lte", "strategy.weights.rank=4", "strategy.weights.alpha=16", "strategy.merge.every=4",
    "data.packing=pad", "optim.grad_clip=null", "trainer.total_batch_size=8", "trainer.steps=11",
    "trainer.keep_checkpoints=9",
]  # fmt: skip
TWO = [*LTE, "strategy.weights.heads=1", "strategy.weights.across_ranks=true", "trainer.devices=2",
       "trainer.strategy=ddp"]  # fmt: skip
UP = "model.layers.0.mlp.up_proj"


def test_heads_on_two_processes_are_two_heads_of_one(
    run: Run, tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank k sees the rows that head k would see. 1e-4 for float32 sums in another order, and for Adam's eps, since a
    gradient is twice as large where the loss is not shared with another head; measured: 6e-7, and 5e-5 in weights."""
    one = run("one", *LTE, "strategy.weights.heads=2", "trainer.batch_size=8")
    two = tmp_path / "two"
    from_step_6 = f"resume={checkpoint_folder(two / 'checkpoints', 6)}"
    on_two(train_all, [(tiny("two", *TWO), None, 0), (tiny("again", *TWO, from_step_6), None, 0)], folder=tmp_path)
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-4)
        assert a["events"] == b["events"]
        assert bool(a["val/loss"]) == bool(b["val/loss"])
        if a["val/loss"]:
            assert float(a["val/loss"]) == pytest.approx(float(b["val/loss"]), rel=1e-4)
    assert [row["step"] for row in rows_of(two) if row["events"] == "merge"] == ["4", "8"]
    ours, theirs = saved(two)["weights"], saved(one)["weights"]
    for name, weight in theirs.items():  # A moves by 0.04, and its first gradients are so small that eps shows
        first = name.endswith(("lora_A", "merged_A"))
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-3 if first else 1e-4)
    assert ours[f"{UP}.lora_B"][0].ne(ours[f"{UP}.lora_B"][1]).any()

    again = saved(tmp_path / "again")
    assert differences(saved(two)["weights"], again["weights"]) == []
    assert differences(saved(two)["state"]["optimizer_states"], again["state"]["optimizer_states"]) == []
    mine, others = (state["state"]["lowrank_train"]["rank_local"] for state in (saved(two), again))
    assert len(mine) == 2 and differences(mine[0], mine[1]) != []
    assert differences(mine, others) == []
    assert rows_of(tmp_path / "again")[6:] == rows_of(two)[6:]

    for folder in (one, two):
        assert main(["export", f"run={folder}", f"out={tmp_path / 'hub' / folder.name}"]) == 0
    exported = [load_file(tmp_path / "hub" / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in exported[0].items():
        torch.testing.assert_close(exported[1][name], weight, rtol=0, atol=1e-4)

    capsys.readouterr()
    bare = tmp_path / "bare" / "checkpoints" / "step_00000006"  # without the configuration, which would tell as much
    shutil.copytree(checkpoint_folder(two / "checkpoints", 6), bare)
    run("alone", *TWO, "trainer.devices=1", f"resume={bare}", code=2)
    assert "holds the weights of 2 devices" in capsys.readouterr().err


def placed(rank: int, ranks: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 12, dtype=torch.float64), nn.Linear(12, 20, dtype=torch.float64))
    model[1] = ParallelHeadsLinear.from_linear(model[1], name="1", heads=1, rank=3, across_ranks=True)
    take_places(model, rank, ranks)
    return model


def test_each_rank_gets_its_own_back_and_ddp_leaves_it_alone() -> None:
    models = [placed(rank, 2) for rank in range(2)]
    names = [f"1.{name}" for name in FACTORS]
    assert rank_local_names(models[0]) == names
    assert models[0]._ddp_params_and_buffers_to_ignore == names
    assert rank_local_names(placed(0, 1)) == []
    checkpoints: list[dict[str, Any]] = []
    optimizers: list[torch.optim.Optimizer] = []
    for rank, model in enumerate(models):
        optimizer = torch.optim.SGD([model[0].weight, model[1].lora_A, model[1].lora_B], lr=0.1)
        for number in range(3):
            param = optimizer.param_groups[0]["params"][number]
            optimizer.state[param]["moment"] = torch.full_like(param, rank + 10 * number)
        state = {"state_dict": dict(model.state_dict()), "optimizer_states": [optimizer.state_dict()]}
        checkpoints.append(state)
        optimizers.append(optimizer)
    parts: list[object] = []
    join_copies(checkpoints[1], models[1], optimizers[1], lambda value: parts.append(value) or [value])
    states = join_copies(checkpoints[0], models[0], optimizers[0], lambda value: [value, parts[0]])
    whole = checkpoints[0]
    assert whole["state_dict"]["1.lora_A"].shape == (2, 3, 12)
    assert whole["state_dict"]["0.weight"] is not None and [sorted(state) for state in states] == [[1, 2], [1, 2]]
    for rank, model in enumerate(models):
        loaded: dict[str, Any] = {"state_dict": dict(whole["state_dict"]), "optimizer_states": [{"state": {}}]}
        take_own_copy(loaded, states, model, rank, 2)
        for name in names:
            assert torch.equal(loaded["state_dict"][name], model.state_dict()[name])
        assert loaded["optimizer_states"][0]["state"][2]["moment"].unique().tolist() == [rank + 20]
    for model, ranks, saved_states in ((placed(0, 3), 3, states), (placed(0, 1), 1, states), (placed(0, 2), 2, [])):
        with pytest.raises(UserError, match="and cannot be trained on with"):
            take_own_copy({"state_dict": {}, "optimizer_states": [{}]}, saved_states, model, 0, ranks)


def test_devices_that_would_train_nothing_in_common_are_refused() -> None:
    model = placed(0, 1)
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    take_places(model, 0, 1)
    with pytest.raises(UserError, match=r"strategy\.freeze_rest=false"):
        take_places(model, 0, 2)


def test_clipping_by_a_norm_that_differs_between_devices_is_refused() -> None:
    words = ["recipe=null", *TWO, "trainer.accelerator=cpu"]
    compose(words)
    with pytest.raises(UserError, match=r"optim\.grad_clip=1: .* use optim\.grad_clip=null"):
        compose([*words, "optim.grad_clip=1"])
    compose([*words, "optim.grad_clip=1", "trainer.devices=1"])
