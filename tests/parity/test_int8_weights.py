"""Q-GaLore and Q-APOLLO with weights that are int8 codes and nothing else, against recorded runs of the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.kernels import int8_update
from lowrank_train.kernels.affine import Affine, dequantize_affine
from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.optim.transform import tensor_of
from tests.parity.recorded import Scenario

METHODS = {
    "qgalore_o1_det": "q_galore",
    "qgalore_o2_stoch": "q_galore",
    "qgalore_o3_8bit": "q_galore",
    "qapollo_o1": "q_apollo",
}


def matrix(start: Tensor) -> nn.Module:
    """A model of one linear layer, whose matrix is `0.weight`."""
    linear = nn.Linear(start.shape[1], start.shape[0], bias=False)
    linear.weight = nn.Parameter(start.clone())
    return nn.Sequential(linear)


def weight_of(model: nn.Module) -> Int8Weight:
    """Its matrix, once it is in codes."""
    weight = model.get_parameter("0.weight")
    assert isinstance(weight, Int8Weight)
    return weight


class Recorded:
    """One recorded run of one matrix, whose published options are given as they are."""

    def __init__(self, folder: Path, name: str, *, inject: bool) -> None:
        self.scenario = Scenario.load(folder, name)
        self.arrays, self.options = self.scenario.arrays, self.scenario.options
        initial, self.gradient = self.scenario.recipe.build(self.scenario.settings["inputs"])
        start = torch.from_numpy(initial["W"].astype(np.float32))
        self.model = matrix(start)
        weights = {name: self.options[name] for name in ("weight_group_size", "stochastic_round")}
        lowrank_train.reparametrise(self.model, "int8", published=True, **weights)
        self.optimizer = lowrank_train.optimizer(
            METHODS[name],
            self.model,
            lr=1.0,
            project=["0.weight"],
            published=True,
            basis_source=self.basis if inject else None,
            **self.options,
        )

    @property
    def weight(self) -> Int8Weight:
        return weight_of(self.model)

    def basis(self, name: str, update: int, grad: Tensor) -> Tensor | None:
        """As it was recorded, decoded where it was recorded in codes."""
        if f"basis@{update}" not in self.arrays:
            return None
        found = self.arrays[f"basis@{update}"].astype(np.float32)
        if f"basis_scales@{update}" in self.arrays:
            found = (found - self.arrays[f"basis_zeros@{update}"]) * self.arrays[f"basis_scales@{update}"]
        rows, columns = self.weight.shape
        return torch.from_numpy(found.reshape((-1, columns) if rows >= columns else (rows, -1)))

    def run(self, monkeypatch: pytest.MonkeyPatch, different: float) -> int:
        """All updates; at each with recorded codes no more than this share is another. How many were compared."""
        compared = 0
        for update, lr in enumerate(self.scenario.recipe.lrs(self.scenario.settings["lr"]), start=1):
            draws = self.arrays.get(f"rand:@{update}")
            if draws is not None:  # of which rounding has the first 16 bits
                bits = torch.from_numpy(np.floor(draws * 2**16).astype(np.int32)).view(1, -1)
                monkeypatch.setattr(int8_update, "random_16_bits", lambda *_, bits=bits: bits)
            self.weight.grad = torch.from_numpy(self.gradient(update, {})["W"].astype(np.float32))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if f"q@{update}" in self.arrays:
                self.compare(f"@{update}", different)
                compared += 1
        return compared

    def compare(self, suffix: str, different: float) -> None:
        apart = self.weight.codes.numpy() != self.arrays[f"q{suffix}"].ravel()
        assert apart.mean() <= different, (suffix, apart.mean())
        for part, name in (("scale", "scales"), ("zero", "zeros")):
            found, expected = getattr(self.weight, part).numpy(), self.arrays[f"{name}{suffix}"].ravel()
            np.testing.assert_allclose(found, expected, rtol=1e-4 if different else 2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_forward_and_gradients_with_the_first_codes(reference_data: Path, name: str) -> None:
    """float32 sums of at most 320 terms in another order: 1e-5 of the largest."""
    recorded = Recorded(reference_data, name, inject=True)
    np.testing.assert_array_equal(recorded.weight.codes.numpy(), recorded.arrays["q0"].ravel())
    recorded.compare("0", 0.0)
    rows, columns = recorded.weight.shape
    generator = np.random.default_rng(recorded.scenario.settings["inputs"]["seed"] + 1)
    x = torch.from_numpy(generator.standard_normal((7, columns)).astype(np.float32)).requires_grad_()
    out = recorded.model(x)
    out.backward(torch.from_numpy(generator.standard_normal((7, rows)).astype(np.float32)))
    assert x.grad is not None and recorded.weight.grad is not None
    found = {"fwd_out": out.detach(), "fwd_dx": x.grad, "fwd_float_grad": recorded.weight.grad}
    for key, value in found.items():
        expected = recorded.arrays[key]
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_codes_with_the_recorded_basis(reference_data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes one by one, to the last update."""
    assert Recorded(reference_data, name, inject=True).run(monkeypatch, 0.0) >= 3


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method == "q_galore"])
def test_codes_with_our_own_decomposition(reference_data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last digit that rounds the other way puts a number one code off: one in a thousand, as with float weights."""
    assert Recorded(reference_data, name, inject=False).run(monkeypatch, 1e-3) >= 3


@pytest.mark.parametrize(("method", "options", "reason"), [("q_galore", {"weight_group_size": 32}, "groups of 64")])
def test_a_group_that_is_not_the_weights_is_refused(method: str, options: dict[str, Any], reason: str) -> None:
    model = matrix(torch.ones(16, 16))
    lowrank_train.reparametrise(model, "int8", weight_group_size=64)
    with pytest.raises(ValueError, match=reason):
        lowrank_train.optimizer(method, model, lr=0.1, project=["0.weight"], rank=4, **options)


@pytest.mark.parametrize("published", [False, True])
def test_a_4_bit_basis_of_one_sign_is_cut_off_only_as_published(published: bool) -> None:
    """Numbers in [0.2, 0.4]: the published zero of 0 and scale of 0.2/15 reach from 0 to 0.2."""
    weight = nn.Parameter(torch.ones(32, 16))
    basis = torch.linspace(0.2, 0.4, 64).view(4, 16)
    optimizer = lowrank_train.optimizer(
        "q_galore",
        [("W", weight)],
        lr=0.1,
        project=["W"],
        published=published,
        basis_source=lambda *_: basis,
        rank=4,
        proj_quant=(True, 64, 4),
    )
    weight.grad = torch.ones(32, 16)
    optimizer.step()
    codes = Affine(*(tensor_of(optimizer.state[weight], f"basis_right.{part}") for part in ("codes", "scale", "zero")))
    decoded = dequantize_affine(codes, (4, 16), bits=4, group=64)
    if published:
        torch.testing.assert_close(decoded, torch.full((4, 16), 0.2))
    else:
        assert (decoded - basis).abs().max() <= 0.4 / 15 / 2 * 1.001


@pytest.mark.parametrize("published", [False, True])
def test_a_group_of_one_sign_is_cut_off_only_as_published(published: bool) -> None:
    """Numbers in [5, 6]: the published zero of 0 and scale of 1/255 reach from 0 to 1."""
    model = matrix(torch.linspace(5, 6, 128).view(8, 16))
    lowrank_train.reparametrise(model, "int8", group=128, published=published)
    decoded = weight_of(model).decoded()
    if published:
        torch.testing.assert_close(decoded, torch.ones(8, 16))
    else:
        assert (decoded - torch.linspace(5, 6, 128).view(8, 16)).abs().max() <= 6 / 255 / 2 * 1.001
