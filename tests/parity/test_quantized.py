"""GaLore with 8-bit Adam, Q-GaLore and Q-APOLLO against recorded runs, through the library entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.kernels.affine import dequantize_affine, quantize_affine
from lowrank_train.optim.transform import State
from tests.parity.recorded import Scenario

LEAVES_OUT = {"weight_group_size", "stochastic_round"}
"""Options of int8 weights, which the recorded runs have and the replay does itself, with the recorded draws."""


class Replay:
    """One recorded float32 run of one matrix W, step by step."""

    def __init__(self, folder: Path, name: str, method: str, *, inject: bool, simulate: bool = False) -> None:
        self.scenario = Scenario.load(folder, name)
        settings = self.scenario.settings
        self.hyper: dict[str, Any] = settings["hyper"] | settings["hyper"].get("group", {})
        self.hyper.pop("group", None)
        self.simulate = False
        initial, self.gradient = self.scenario.recipe.build(settings["inputs"])
        self.weight = nn.Parameter(torch.from_numpy(initial["W"].astype(np.float32)))
        if "q0" in self.scenario.arrays:
            self.round()
        self.simulate = simulate
        self.first = self.weight.detach().clone()
        left_out = set() if simulate or name == "qgalore_sim_o4" else LEAVES_OUT
        self.optimizer = lowrank_train.optimizer(
            method,
            [("W", self.weight)],
            lr=1.0,
            project=["W"],
            published=True,
            basis_source=self.basis if inject else None,
            **{key: value for key, value in self.hyper.items() if key not in left_out},
        )
        self.seen: list[State] = []

    @property
    def state(self) -> State:
        state: State = self.optimizer.state[self.weight]
        return state

    def run(self) -> None:
        for update, lr in enumerate(self.scenario.recipe.lrs(self.scenario.settings["lr"]), start=1):
            self.weight.grad = torch.from_numpy(self.gradient(update, {})["W"].astype(np.float32))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if "q0" in self.scenario.arrays:
                self.round(self.scenario.arrays.get(f"rand:@{update}"))
            self.seen.append({key: value for key, value in self.state.items() if isinstance(value, int)})
            self.compare(update)

    def round(self, draws: np.ndarray | None = None) -> None:
        """What int8 weights lose of an update."""
        group = self.hyper["weight_group_size"]
        uniform = None if draws is None else torch.from_numpy(draws)
        coded = quantize_affine(self.weight, bits=8, group=group, uniform=uniform, published=True)
        self.codes = coded.codes.numpy()
        if not self.simulate:  # else the optimizer has rounded them already
            self.weight.data.copy_(dequantize_affine(coded, self.weight.shape, bits=8, group=group))

    def basis(self, name: str, update: int, grad: Tensor) -> Tensor | None:
        """As it was recorded, decoded where it was recorded in codes."""
        arrays = self.scenario.arrays
        for key in (f"basis:W@{update}", f"basis_q:W@{update}", f"basis@{update}"):
            if key not in arrays:
                continue
            found = arrays[key].astype(np.float32)
            scales = key.replace("basis_q", "basis").replace("basis", "basis_scales")
            if scales in arrays:
                found = (found - arrays[scales.replace("scales", "zeros")]) * arrays[scales]
            rows, columns = self.weight.shape
            rank = self.hyper["rank"]
            return torch.from_numpy(found.reshape((rank, columns) if rows >= columns else (rows, rank)))
        return None

    def compare(self, update: int) -> None:
        """Codes of the weights one by one, or weights relative to the whole displacement."""
        arrays, last = self.scenario.arrays, self.scenario.settings["lr"]["T"]
        if f"W@{update}" in arrays:
            displacement = np.linalg.norm(arrays[f"W@{last}"] - self.first.numpy())
            error = np.linalg.norm(arrays[f"W@{update}"] - self.weight.detach().numpy()) / displacement
            assert error < self.tolerance, (update, error)
        if f"q@{update}" in arrays:
            different = (self.codes != arrays[f"q@{update}"].ravel()).mean()
            assert different <= self.different_codes, (update, different)

    tolerance = 5e-5
    different_codes = 0.0

    def compare_moments(self, *, codes_off: float) -> None:
        for theirs, ours in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
            key = next(key for key in (f"final:W:{theirs}", f"final:{theirs}") if key in self.scenario.arrays)
            recorded = self.scenario.arrays[key]
            if recorded.dtype == np.uint8:
                codes, scale = (self.state[f"{ours}.{part}"] for part in ("q8", "scale"))
                assert isinstance(codes, Tensor) and isinstance(scale, Tensor)
                off = np.abs(codes.numpy().astype(int) - recorded.astype(int))
                assert (off > 0).mean() <= codes_off and off.max() <= (3 if codes_off else 0)
                largest = self.scenario.arrays[key.replace("state", "absmax")]
                np.testing.assert_allclose(scale.numpy(), largest, rtol=1e-5)
            else:
                moment = self.state[ours]
                assert isinstance(moment, Tensor)
                np.testing.assert_allclose(moment.numpy(), recorded, rtol=0, atol=5e-6 * np.abs(recorded).max())


CODED = ["qgalore_o1_det", "qgalore_o2_stoch", "qgalore_o3_8bit"]
FLOAT = ["galore_adamw8bit_o1_32bitstate", "galore_adamw8bit_o2"]


@pytest.mark.parametrize("name", [*FLOAT, *CODED])
def test_with_the_recorded_basis(reference_data: Path, name: str) -> None:
    """Weights to float32 rounding, or as the same int8 codes; moments as the same codes and scales."""
    replay = Replay(reference_data, name, "galore_8bit" if name in FLOAT else "q_galore", inject=True)
    replay.run()
    replay.compare_moments(codes_off=0.0)


@pytest.mark.parametrize("name", [*FLOAT, *CODED])
def test_with_our_own_decomposition(reference_data: Path, name: str) -> None:
    """A last digit that rounds the other way puts an 8-bit number one code off, and with it what follows from it."""
    replay = Replay(reference_data, name, "galore_8bit" if name in FLOAT else "q_galore", inject=False)
    replay.tolerance, replay.different_codes = 2e-3, 1e-3
    replay.run()
    replay.compare_moments(codes_off=0.01)


@pytest.mark.parametrize("name", CODED)
def test_interval_and_moves_are_those_recorded(reference_data: Path, name: str) -> None:
    replay = Replay(reference_data, name, "q_galore", inject=False)
    replay.different_codes = 1e-3
    replay.run()
    recorded = replay.scenario.arrays["gap_svdcount_queuemean_per_step"]
    assert [state["interval"] for state in replay.seen] == recorded[:, 0].tolist()
    assert [state["refreshes"] for state in replay.seen] == recorded[:, 1].tolist()


@pytest.mark.parametrize("inject", [True, False])
def test_simulated_int8_weights(reference_data: Path, inject: bool) -> None:
    """Float weights that are rounded to int8 groups by the optimizer itself after each update."""
    Replay(reference_data, "qgalore_sim_o4", "q_galore", inject=inject).run()


def test_simulation_equals_int8_weights(reference_data: Path) -> None:
    """The same codes as the recorded run on real int8 weights."""
    Replay(reference_data, "qgalore_o1_det", "q_galore", inject=True, simulate=True).run()


def test_q_apollo(reference_data: Path) -> None:
    replay = Replay(reference_data, "qapollo_o1", "q_apollo", inject=True)
    replay.run()
    replay.compare_moments(codes_off=0.0)
    limited = replay.state["limited_norm"]
    assert float(limited) == pytest.approx(float(replay.scenario.arrays["final:scaled_grad"]), rel=1e-5)


def test_stochastic_rounding_of_simulated_weights_follows_the_seed() -> None:
    """The same run twice, and another one with another seed."""
    found = []
    for seed in (0, 0, 1):
        weight = nn.Parameter(torch.linspace(-1, 1, 256).view(16, 16))
        optimizer = lowrank_train.optimizer(
            "q_galore",
            [("W", weight)],
            lr=0.01,
            project=["W"],
            seed=seed,
            rank=4,
            weight_group_size=64,
            stochastic_round=True,
        )
        for _ in range(3):
            weight.grad = torch.ones(16, 16)
            optimizer.step()
        found.append(weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("q_galore", {"quant_n_bit": 3}, "4 or 8 bits"),
        ("q_galore", {"proj_type": "full"}, "std alone"),
        ("galore_8bit", {"qmap": "linear"}, "dynamic"),
        ("galore_8bit", {"min_8bit_sze": 1}, "min_8bit_size"),
    ],
)
def test_wrong_options_are_refused(method: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        lowrank_train.optimizer(
            method, [("W", nn.Parameter(torch.ones(4, 4)))], lr=0.1, project=["W"], rank=2, **options
        )


@pytest.mark.parametrize("shape", [(64, 80), (5000,), (30, 40)])
def test_the_rest_is_trained_as_by_bitsandbytes(shape: tuple[int, ...]) -> None:
    """Its AdamW8bit on the CPU: whole blocks, a shorter last one, and a tensor too small for codes; with decay."""
    library = pytest.importorskip("bitsandbytes.optim")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = lowrank_train.optimizer(
        "galore_8bit", [("embed", ours)], lr=0.01, project=[], published=True, weight_decay=0.1
    )
    other = library.AdamW8bit([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(8):
        grad = torch.randn(shape, generator=generator) * 1e-3
        for param, optimizer in ((ours, mine), (theirs, other)):
            param.grad = grad.clone()
            optimizer.step()
    displacement = (theirs.detach() - start).norm()
    assert (ours.detach() - theirs.detach()).norm() < 1e-4 * displacement
    if start.numel() >= 4096:
        different = mine.state[ours]["exp_avg.q8"] != other.state[theirs]["state1"]
        assert different.float().mean() < 1e-3
