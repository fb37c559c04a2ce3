"""ReLoRA's published layer, merges, resets and schedule, replayed through the library entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_train import reparametrise, schedule
from lowrank_train.nn.lora import LoRALinear

SCENARIOS = ("relora_o1_magnitude", "relora_o2_reset")


class Recorded:
    """One scenario: its settings, its arrays, and the tensors that its recipe draws."""

    def __init__(self, folder: Path, name: str) -> None:
        self.inputs: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["inputs"]
        with np.load(folder / f"{name}.npz") as arrays:
            self.arrays = dict(arrays)
        rng, i = np.random.default_rng(self.inputs["seed"]), self.inputs
        root = np.sqrt(i["in"])
        self.weight = tensor(rng.standard_normal((i["out"], i["in"])) / root)
        self.first = tensor(rng.uniform(-1, 1, (i["r"], i["in"])) / root)
        self.second = tensor(rng.standard_normal((i["out"], i["r"])) * i["b_scale"])
        self.x = tensor(rng.standard_normal((i["N"], i["in"])))
        self.y = self.x @ tensor(rng.standard_normal((i["out"], i["in"])) / root).T

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        index = ((step - 1) * self.inputs["B"] + torch.arange(self.inputs["B"])) % self.inputs["N"]
        return self.x[index], self.y[index]


def tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def built(run: Recorded) -> tuple[LoRALinear, Any, Any]:
    i = run.inputs
    linear = nn.Linear(i["in"], i["out"], bias=False, dtype=torch.float64)
    linear.weight.data.copy_(run.weight)
    model = nn.Sequential(linear)
    strategy = reparametrise(
        model, "relora", published=True, r=i["r"], alpha=i["alpha"], relora=i["relora"], cycle_length=i["cycle"],
        prune=i["prune"], ratio=i["ratio"], eps=1e-3,
    )  # fmt: skip
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    for param, value in zip(layer.factors, (run.first, run.second), strict=True):
        param.data.copy_(value)
    return layer, strategy, strategy.optimizer(model, lr=i["lr"])


def assert_close(found: Tensor, recorded: NDArray[Any]) -> None:
    """Both sides are float64 and add in another order; the numbers are of size 1."""
    np.testing.assert_allclose(found.detach().numpy(), recorded, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SCENARIOS)
def test_layer_and_gradients(name: str, reference_data: Path) -> None:
    run = Recorded(reference_data, name)
    layer, _, _ = built(run)
    x, y = run.rows(1)
    out = layer(x.requires_grad_())
    (0.5 * (out - y).square().mean()).backward()
    for found, key in ((out, "out"), (x.grad, "d_x"), (layer.lora_A.grad, "d_A"), (layer.lora_B.grad, "d_B")):
        assert found is not None
        assert_close(found, run.arrays[key])


@pytest.mark.parametrize("name", SCENARIOS)
def test_whole_run(name: str, reference_data: Path) -> None:
    """Every loss, every merge, every pruning; the random draws of the recording are put in where it made them."""
    run = Recorded(reference_data, name)
    layer, strategy, optimizer = built(run)
    i, model = run.inputs, nn.Sequential(layer)
    factor = schedule(
        "cosine_restarts", repo="relora", num_training_steps=i["total"], warmup_steps=i["warmup"],
        min_lr_ratio=i["min_lr_ratio"], cycle_length=i["cycle"], restart_warmup_steps=i["restart_warmup"],
    )  # fmt: skip
    first, second = layer.factors
    kinds = {"A": first, "B": second}
    merges = 0
    for step in range(1, i["T"] + 1):
        rate = i["lr"] * factor(step - 1)
        assert rate == pytest.approx(run.arrays["lrs"][step - 1], abs=1e-15)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = run.rows(step)
        loss = 0.5 * (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(run.arrays["losses"][step - 1], rel=1e-10)
        before = {kind: dict(optimizer.state[param]) for kind, param in kinds.items()}
        factors = {kind: param.detach().clone() for kind, param in kinds.items()}
        happened = [event.name for event in strategy.run_events(step, model, optimizer)]
        assert ("merge" in happened) == (f"W_merged@{step}" in run.arrays)
        if "merge" in happened:
            merges += 1
            for kind, value in factors.items():
                assert_close(value, run.arrays[f"{kind}_before@{step}"])
            assert_close(layer.weight, run.arrays[f"W_merged@{step}"])
            assert not layer.lora_B.any()
            first.data.copy_(tensor(run.arrays[f"A_new@{step}"]))
        assert ("reset of moments" in happened) == (f"state_after@{step}:A.exp_avg" in run.arrays)
        if "reset of moments" in happened:
            for kind, param in kinds.items():
                assert optimizer.state[param]["step"] == before[kind]["step"]  # the published one lets it go on
                for key in ("exp_avg", "exp_avg_sq"):
                    recorded = run.arrays[f"state_after@{step}:{kind}.{key}"]
                    if i["prune"] == "magnitude":
                        assert_close(optimizer.state[param][key], recorded)
                    else:  # it drew its masks from torch's generator; ours keep about as many
                        assert optimizer.state[param][key].count_nonzero() <= 0.02 * recorded.size
                    optimizer.state[param][key].copy_(tensor(recorded))
    assert merges == (i["T"] - 1) // i["relora"]
    for kind, param in (("W", layer.weight), ("A", first), ("B", second)):
        assert_close(param, run.arrays[f"{kind}@end"])
