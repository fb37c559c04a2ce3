"""Every recorded optimizer run, replayed through lowrank_train.optimizer: one table, one row a family of recordings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_train.published import optimizer
from tests.conftest import PROJECT_ROOT
from tests.parity.recorded import Replay, Scenario, replay

ROUNDING = 1e-12  # float64, the same arithmetic in another order


@dataclass(frozen=True)
class Family:
    """Recordings whose name begins alike."""

    prefix: str
    method: str
    injected: float | None = ROUNDING  # None: the recording's own tolerance, since it lacks most of the bases
    own_basis: bool = True  # the basis can be found from the gradient; what is drawn at random can only be supplied
    sign_matters: bool = True  # of basis vectors; where moments are rotated, or nothing is decomposed, it does not
    state: bool = True  # the final state is in coordinates of the recorded basis


FAMILIES = [
    Family("galore_adamw_", "galore"),
    Family("galore_adafactor_", "galore_adafactor"),
    Family("fira_adamw_", "fira"),
    Family("fira_rmsprop_", "fira_rmsprop"),
    Family("apollo_mini_", "apollo", own_basis=False),
    Family("apollo_random_", "apollo", own_basis=False),
    Family("apollo_svd_", "apollo"),
    Family("frugal_galore_", "frugal"),
    Family("frugal_lion_", "frugal_lion"),
    Family("frugal_columns_", "frugal_coord", own_basis=False),
    Family("frugal_randk_", "frugal_coord", own_basis=False),
    Family("osd_adamw_", "online_subspace"),
    Family("osd_lion_", "online_subspace_lion"),
    Family("natural_galore_", "natural_galore", own_basis=False),  # found by alternating iterations of its own
    Family(
        "ldadam_", "ldadam", injected=None, sign_matters=False, state=False
    ),  # 2 of 20 bases are recorded; the rest have other signs
    Family("dct_adamw_", "dct_adamw", sign_matters=False),
    Family("flora_o", "flora", own_basis=False),
    Family("gradnormlorp_", "gradnormlorp"),
]

ELSEWHERE = {
    "flora_accum_": "here, below: it steps once in four gradients",
    "galore_adamw8bit_": "tests/parity/test_quantized.py",
    "qgalore_": "tests/parity/test_quantized.py",
    "qapollo_": "tests/parity/test_quantized.py",
    "badam_": "tests/parity/test_blocks.py",
    "frugal_block_": "tests/parity/test_blocks.py",
    "relora_": "layers, not optimizers",
    "sltrain_": "layers, not optimizers",
    "schedules_": "tests/parity/test_schedules.py",
    "published_defects": "not a run",
    "INDEX": "not a run",
}

STATE_KEYS = {
    "m": "exp_avg",
    "v": "exp_avg_sq",
    "ef": "error",
    "scaling_grad": "limited_norm",
    "scaled_grad": "limited_norm",
    "exp_avg_v": "exp_avg",
    "exp_avg_sq_v": "exp_avg_sq",
    "exp_avg_g": "length_exp_avg",
    "exp_avg_sq_g": "length_exp_avg_sq",
}
"""Their name of a piece of state -> ours, where they differ."""


FOLDER = Path(os.environ.get("LOWRANK_TRAIN_REFERENCE") or PROJECT_ROOT.parent / "shared" / "reference")
RECORDINGS = sorted(path.stem for path in FOLDER.glob("*.json"))  # none where there is no such folder
PAIRS = [(name, family) for family in FAMILIES for name in RECORDINGS if name.startswith(family.prefix)]
RUNS = [pytest.param(name, family, id=name) for name, family in PAIRS]
OWN_RUNS = [pytest.param(name, family, id=name) for name, family in PAIRS if family.own_basis]


def test_every_recording_belongs_to_a_row(reference_data: Path) -> None:
    """So that none is forgotten, and none is run by two rows."""
    prefixes = [family.prefix for family in FAMILIES] + list(ELSEWHERE)
    for name in RECORDINGS:
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    assert all(any(name.startswith(family.prefix) for name in RECORDINGS) for family in FAMILIES)


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_with_the_recorded_basis(reference_data: Path, name: str, family: Family) -> None:
    """The same arithmetic: float64 agrees to rounding at every update, weights and state alike."""
    scenario = Scenario.load(reference_data, name)
    result = replay(scenario, family.method, scenario.recorded_basis)
    tolerance = family.injected or scenario.settings["tolerance_own_svd"]
    assert result.error < tolerance
    assert result.trace_error < max(tolerance, 1e-11)  # a norm is recorded to fewer digits than its tensor
    for key, recorded in scenario.arrays.items():
        kind, _, rest = key.partition(":")
        if kind == "final" and ":" in rest and family.state:
            tensor, _, piece = rest.partition(":")
            ours = state_of(result, tensor, piece)
            np.testing.assert_allclose(ours, recorded, rtol=1e-8, atol=1e-11 * np.abs(recorded).max(), err_msg=key)


@pytest.mark.parametrize(("name", "family"), OWN_RUNS)
def test_with_our_own_basis(reference_data: Path, name: str, family: Family) -> None:
    """The same subspace, found in float64 where the published code decomposes in float32; signs as recorded."""
    scenario = Scenario.load(reference_data, name)
    result = replay(scenario, family.method, scenario.own_basis if family.sign_matters else None)
    assert result.error < (scenario.settings.get("tolerance_own_svd") or 2e-5)  # 2e-5: the least of all recordings


def state_of(result: Replay, tensor: str, piece: str) -> np.ndarray:
    """A piece of the final state in the terms of the published code."""
    state, weight = result.state(tensor), result.weights[tensor].detach()
    if piece == "g":  # of W = g V / |V|, row by row
        return weight.norm(dim=-1, keepdim=True).numpy()
    if piece == "v" and "length_stretch" in state:
        return (weight * state["length_stretch"]).numpy()
    return state[STATE_KEYS.get(piece, piece)].numpy()


@pytest.mark.parametrize("early", [True, False])
def test_flora_accumulates_compressed_gradients(reference_data: Path, early: bool) -> None:
    """Each micro-batch compressed and freed in its backward pass; or the sum of them, which is the same."""
    scenario = Scenario.load(reference_data, "flora_accum_o1")
    options = dict(scenario.options)
    lr, micro_batches = options.pop("lr"), options["accumulation"]
    initial, gradient = scenario.recipe.build(scenario.settings["inputs"])
    weights = {name: nn.Parameter(torch.from_numpy(value).float()) for name, value in initial.items()}

    def projection(name: str, update: int, grad: torch.Tensor) -> np.ndarray:
        return scenario.arrays[f"proj:{name}@{update}"]

    optim = optimizer(
        "flora", list(weights.items()), lr=lr, project=["W"], published=True, basis_source=projection, **options
    )
    for update in (1, 2, 3):
        for micro_batch in range(micro_batches):
            grads = gradient((update - 1) * micro_batches + micro_batch + 1, {})
            loss = sum((weights[n] * torch.from_numpy(g).float()).sum() for n, g in grads.items()) / micro_batches
            if early:
                loss.backward()
                assert weights["W"].grad is None
            else:
                for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                    held = weights[name].grad
                    weights[name].grad = grad if held is None else held + grad
        optim.step()
        optim.zero_grad()
        for name, weight in weights.items():
            np.testing.assert_allclose(
                weight.detach().numpy(), scenario.arrays[f"{name}@{update}"], rtol=1e-5, atol=1e-6
            )
