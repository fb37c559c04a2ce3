"""A run under DeepSpeed's ZeRO: from a checkpoint of one process on, and its own is one that everybody reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_train.checkpoint import checkpoint_folder
from lowrank_train.cli import main
from lowrank_train.config import UserError, compose
from lowrank_train.config.zero_checks import require_package
from lowrank_train.optim.groups import Group
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.selection import slots_for
from lowrank_train.train.zero import ZeroPrecision, update_stats, zero_strategy
from tests.train.conftest import rows_of, saved
from tests.train.zero_on_cpu import train_all_on_cpu
from tests.two_processes import on_two

# Adam's eps is large, for a small gradient's rounding is not to become an update's.
SETTINGS = ["strategy.rest.eps=1e-3", "data.packing=pad", "trainer.steps=6", "trainer.total_batch_size=8",
            "trainer.keep_checkpoints=2"]  # fmt: skip
LORA = ("strategy=lora", "strategy.weights.rank=4")
FULL = ("strategy=full", "model.tie_word_embeddings=true", "model.activation_checkpointing=true")


@pytest.mark.parametrize(("stage", "strategy"), [(2, LORA), (3, FULL)], ids=["zero2", "zero3"])
def test_a_run_goes_on_under_zero_and_is_exported(
    run: Callable[..., Path],
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    stage: int,
    strategy: tuple[str, ...],
) -> None:
    """Three updates by one process, three by two: as six by one, in float32; and two more by one."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    settings = [*SETTINGS, *strategy]
    one = run("one", *settings, "trainer.batch_size=8")
    start = checkpoint_folder(one / "checkpoints", 3)
    devices = [f"trainer.strategy=deepspeed_zero{stage}", "trainer.devices=2", "trainer.batch_size=4"]
    words = tiny("two", *settings, *devices, f"resume={start}")
    on_two(train_all_on_cpu, [(["train", *words], None, 0)], folder=tmp_path)
    assert_same(one, tmp_path / "two", 6)
    results = [json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    for key in ("parameters", "trainable_parameters", "val_tokens"):
        assert results[0][key] == results[1][key]
    if stage == 3:
        assert results[1]["weights_bytes"] == results[0]["weights_bytes"] / 2
    more = [*settings, "trainer.batch_size=8", "trainer.steps=8"]
    assert_same(run("on", *more, f"resume={one}"), run("back", *more, f"resume={tmp_path / 'two'}"), 8)
    assert main(["export", f"run={tmp_path / 'two'}", f"out={tmp_path / 'hub'}"]) == 0


def assert_same(one: Path, two: Path, updates: int) -> None:
    """The last checkpoints and all rows, but for the last digits of float32."""
    expected, found = saved(one), saved(two)
    for name, weight in expected["weights"].items():
        assert torch.allclose(weight, found["weights"][name], rtol=0, atol=1e-6), name
    (ours,), (theirs,) = (content["state"]["optimizer_states"] for content in (expected, found))
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in ours["state"].items():
        assert state["step"] == theirs["state"][number]["step"] == updates
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(state[key], theirs["state"][number][key], rtol=0, atol=1e-6), (number, key)
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        for column in ("train/loss", "train/lr", "train/grad_norm", "tokens"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-5), column
        assert bool(a["val/loss"]) == bool(b["val/loss"])
        if a["val/loss"]:
            assert float(a["val/loss"]) == pytest.approx(float(b["val/loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["strategy=full", "trainer.accelerator=cpu"], "DeepSpeed trains on GPUs only"),
        (["strategy=galore"], "strategy galore has strategy.subspace, which needs whole ones"),
        (["strategy=relora"], "strategy.merge changes those of whole matrices"),
        (["strategy=full", "strategy.when=in_backward"], "takes each gradient out of the backward pass itself"),
        (["strategy=full", "strategy/storage=q8"], "strategy.storage goes by tensors"),
        (["strategy=full", "precision=bf16"], "updates float32 copies of the weights"),
        (["strategy=full", "trainer=deepspeed_zero3", "model.compile=true"], "use model.compile=false"),
    ],
)
def test_what_flat_shards_cannot_give_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=r"trainer\.strategy=deepspeed_zero") as refusal:
        compose(["recipe=null", "trainer=deepspeed_zero2", *words])
    assert reason in str(refusal.value)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs with it; the support page does not depend on what is installed."""
    config = compose(["recipe=null", "strategy=full", "trainer=deepspeed_zero1", "trainer.accelerator=auto"])
    monkeypatch.setattr("lowrank_train.config.zero_checks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed; pip install -e '\.\[deepspeed\]'"):
        require_package(config)


def test_without_a_gpu_the_machine_is_named() -> None:
    config = compose(["recipe=null", "strategy=full", "trainer=deepspeed_zero1", "trainer.accelerator=auto"])
    with pytest.raises(UserError, match="there is none here"):
        zero_strategy(config, torch.device("cpu"))


@pytest.mark.parametrize("narrow", [False, True])
def test_autocast_is_on_within_the_engine(narrow: bool) -> None:
    """DeepSpeed's forward pass turns off what is on around it, so that nothing may be."""

    class Module(torch.nn.Module):
        def training_step(self) -> bool:
            return torch.is_autocast_enabled("cpu")

    precision = ZeroPrecision(torch.device("cpu"), narrow=narrow)
    module = Module()
    precision.convert_module(module)
    with precision.train_step_context():
        assert not torch.is_autocast_enabled("cpu")
        assert module.training_step() is narrow


@pytest.mark.parametrize(
    ("norm", "skipped"), [(0.5, False), (torch.tensor(0.5), False), (float("inf"), True), (-1.0, True)]
)
def test_an_update_that_zero_left_out_is_counted(norm: float, skipped: bool) -> None:
    """-1 is what DeepSpeed calls a norm that is not finite."""

    params = [("a", torch.nn.Parameter(torch.ones(2))), ("b", torch.nn.Parameter(torch.ones(3)))]
    optimizer = TransformOptimizer([Group("rest", Adam(), list(params), slots_for(params, seed=0))], lr=0.1)
    stats = update_stats(norm, optimizer)
    assert stats["skipped_names"] == (["a", "b"] if skipped else [])
    assert stats["grad_norm"] == (None if skipped else 0.5)
