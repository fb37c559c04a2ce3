"""The benchmarks of a GPU as far as they go without one: their arithmetic, their runs on the CPU, and their refusal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_kernels, gpu_runs, rows
from benchmarks.gpu_kernels import Cost, linear_cost, projected_step_cost
from lowrank_train.config import compose
from lowrank_train.kernels.blockwise import quantize_blockwise

TINY = ["model=llama_9m", "model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=4"]
TINY += ["model.num_hidden_layers=2", "model.vocab_size=64", "trainer.batch_size=2", "data.seq_len=16", "recipe=null"]


def test_bytes_of_a_projected_step_are_those_of_its_tensors() -> None:
    weight, grad = torch.zeros(96, 64, dtype=torch.bfloat16), torch.zeros(96, 64, dtype=torch.bfloat16)
    basis, direction = torch.zeros(64, 16), torch.zeros(96, 16)
    moments = [*quantize_blockwise(direction, signed=True), *quantize_blockwise(direction, signed=False)]
    read = [grad, basis, *moments, direction, basis, weight]
    written = [*moments, direction, weight]
    cost = projected_step_cost(96, 64, 16, basis_bytes=4, moment_bytes=1 + 4 / 256)
    assert cost.bytes == sum(tensor.nbytes for tensor in read + written)
    assert cost.flops == 2 * (2 * 96 * 64 * 16)
    assert projected_step_cost(64, 96, 16, basis_bytes=4, moment_bytes=1 + 4 / 256) == cost


def test_cost_of_a_layer() -> None:
    cost = linear_cost(10, 3, 5, weight_bytes=2, products=3)
    assert cost == Cost(bytes=3 * 2 * (10 * 3 + 10 * 5 + 3 * 5), flops=3 * 2 * 10 * 3 * 5)


def test_limit_is_the_longer_time() -> None:
    assert Cost(4.8e9, 1.0).limit_sec("NVIDIA H200") == pytest.approx(1e-3)
    assert Cost(1.0, 989.5e9).limit_sec("NVIDIA H200") == pytest.approx(1e-3)
    assert Cost(1.0, 1.0).limit_sec("a card that nobody knows") is None


def test_bandwidth_is_known_where_a_peak_is() -> None:
    for pattern, value in gpu_kernels.BANDWIDTH:
        name = pattern.replace("(SXM4|PCIE)", "SXM4")
        assert 1e11 < value < 1e13 and Cost(1.0, 1.0).limit_sec(name) is not None


def test_without_a_card_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    assert gpu.main() == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "needs an NVIDIA GPU" in said.err and not said.out
    assert not (tmp_path / "results").exists()


def test_surroundings() -> None:
    found = gpu.surroundings()
    assert set(found) == {"driver", "cuda", "triton", "commit"}
    assert gpu.output(["no-such-program"]) is None and gpu.output(["false"]) is None


@pytest.mark.parametrize("strategy", ["galore_8bit", "sltrain"])
def test_training_run_on_the_cpu(strategy: str) -> None:
    """Two micro-batches an update; random tokens of 64 kinds begin near ln 64."""
    part = "subspace" if strategy == "galore_8bit" else "weights"
    config = compose([*TINY, f"strategy={strategy}", f"strategy.{part}.rank=4", "trainer.total_batch_size=4"])
    run = gpu_runs.trained(config, torch.device("cpu"), 3)
    assert run["positions"] == 4 * 16 and len(run["seconds"]) == len(run["losses"]) == 3
    assert run["losses"][0] == pytest.approx(math.log(64), abs=0.2)
    assert len(set(run["losses"])) == 3 and run["flops_per_position"] > 0


def test_recipes_and_strategies_compose() -> None:
    for recipe in gpu_runs.CAPS:
        config = gpu_runs.recipe_config(recipe)
        assert config.model.name == "llama_7b" and config.data.seq_len > 0
    for strategy in gpu_runs.STRATEGIES:
        assert gpu_runs.small_config(strategy, "llama_60m").strategy.name == strategy


def test_planned_peak_is_that_of_updates() -> None:
    config = compose([*TINY, "strategy=galore", "strategy.subspace.rank=4", "task=plan"])
    weights = sum(math.prod(shape) for shape in [(64, 32), (64, 32)]) * 4
    assert weights < gpu_runs.planned_peak(config) < 2**24


def test_our_side_of_the_projected_step_has_kernels() -> None:
    matrix = torch.nn.Parameter(torch.zeros(2048, 1024))
    optimizer = gpu_kernels.ours({"matrix": matrix})
    assert optimizer.transforms[0].fused is not None  # type: ignore[attr-defined]
    optimizer.initialize()  # type: ignore[attr-defined]
    assert gpu_kernels.basis_bytes(optimizer) == 4
