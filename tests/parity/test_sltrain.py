"""SLTrain's layer against recorded runs of the published one: outputs, gradients, and ten updates of Adam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_train.kernels import sparse_lowrank
from lowrank_train.nn.sltrain import SLTrainLinear

RELATIVE = 1e-12  # float64: a few roundings of sums of at most 96 products; the recordings' own check got 1e-15

Array = NDArray[Any]


def inputs_of(settings: dict[str, Any]) -> dict[str, Array]:
    """What the recording's `recipe` draws, in its order."""
    rng, rows, columns = np.random.default_rng(settings["seed"]), settings["out"], settings["in"]
    made: dict[str, Array] = {"lora_A": rng.uniform(-1, 1, (settings["r"], columns)) / np.sqrt(columns)}
    made["lora_B"] = rng.standard_normal((rows, settings["r"])) * settings["b_scale"]
    count = int(settings["sp_ratio"] * rows * columns)
    made["sparse_index"] = np.sort(rng.permutation(rows * columns)[:count])
    made["sparse_value"] = rng.uniform(-1, 1, count) / np.sqrt(columns)
    if settings["bias"]:
        made["bias"] = rng.uniform(-1, 1, rows) / np.sqrt(rows)
    made["x"] = rng.standard_normal((*settings["batch"], columns))
    made["y"] = rng.standard_normal((*settings["batch"], rows))
    if settings["scaling"]:
        made["scaling"] = np.ones(1)
    return made


def assert_close(found: Tensor, expected: Array, what: str) -> None:
    error = np.linalg.norm(found.detach().numpy() - expected)
    assert error <= RELATIVE * np.linalg.norm(expected), f"{what}: {error}"


@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
def test_recorded_runs(reference_data: Path, factored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recording of the layer, in both orders of its product."""
    if factored and not sparse_lowrank.HAS_SPARSE_PRODUCTS:
        pytest.skip("sparse products on the CPU need MKL")
    monkeypatch.setattr(sparse_lowrank, "is_factored", lambda *_: factored)
    paths = sorted(reference_data.glob("sltrain_*.json"))
    assert {"sltrain_o1", "sltrain_o2", "sltrain_o3_scaling"} <= {path.stem for path in paths}
    for path in paths:
        replay(path)


def replay(path: Path) -> None:
    """Inputs into the layer by name; then outputs and all gradients, and ten updates with eleven losses."""
    settings = json.loads(path.read_text())
    given, made = settings["inputs"], inputs_of(settings["inputs"])
    with np.load(path.with_suffix(".npz")) as file:
        expected: dict[str, Array] = dict(file)
    layer = SLTrainLinear.from_linear(
        nn.Linear(given["in"], given["out"], bias=given["bias"], dtype=torch.float64),
        rank=given["r"],
        alpha=given["alpha"],
        sp_ratio=given["sp_ratio"],
        trainable_scaling=given["scaling"],
    )
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in made.items() if key not in "xy"})
    assert sorted(key for key, _ in layer.named_parameters()) == sorted(settings["parameter_order"])
    x, y = (torch.from_numpy(made[key]) for key in "xy")
    optimizer = torch.optim.Adam(layer.parameters(), lr=given["lr"])
    losses = []
    for update in range(11):
        start = x.clone().requires_grad_()
        out = layer(start)
        loss = 0.5 * (out - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        if update == 0:
            assert_close(out, expected["out"], f"{path.stem} out")
            found = {"d_x": start.grad} | {f"d_{key}": value.grad for key, value in layer.named_parameters()}
            assert found.keys() == {key for key in expected if key.startswith("d_")}
            for key, grad in found.items():
                assert grad is not None
                assert_close(grad, expected[key], f"{path.stem} {key}")
        if update < 10:
            optimizer.step()
            optimizer.zero_grad()
    for key, param in layer.named_parameters():
        assert_close(param, expected[f"{key}@10"], f"{path.stem} {key}@10")
    assert_close(torch.tensor(losses, dtype=torch.float64), expected["losses"], f"{path.stem} losses")
