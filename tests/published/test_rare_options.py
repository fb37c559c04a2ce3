"""Published options that no recording has: each beside what it says it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.optim.natural import NaturalAdam
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.transform import State, tensor_of

SHAPES = [(24, 10), (10, 24), (16, 16), (15, 11)]  # tall, wide, square, odd


def run(
    method: str, shape: tuple[int, int] = (24, 10), updates: int = 6, lr: float = 1e-2, **options: Any
) -> tuple[TransformOptimizer, Tensor, Tensor]:
    """The optimizer, a projected matrix and a bias of the rest, after some updates with the same random gradients."""
    generator = torch.Generator().manual_seed(0)
    matrix, bias = (nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in (shape, (7,)))
    optimizer = lowrank_train.optimizer(method, [("mlp.weight", matrix), ("mlp.bias", bias)], lr=lr, **options)
    for _ in range(updates):
        for param in (matrix, bias):
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, matrix.detach(), bias.detach()


def state_of_matrix(optimizer: TransformOptimizer) -> State:
    """What is kept for the matrix of `run`."""
    (matrix,) = (param for param, slot in optimizer.slots.items() if slot.name == "mlp.weight")
    return optimizer.state_of(matrix)


@pytest.mark.parametrize("rule", ["sign_sgd", "sgd"])
@pytest.mark.parametrize("method", ["frugal", "frugal_coord", "frugal_lion", "frugal_sgd"])
def test_frugal_with_density_0_is_state_free_on_matrices(method: str, rule: str) -> None:
    options: dict[str, Any] = {"proj_params_lr_scale": 0.5, "inactive_lr_scale": 0.25, "inactive_update_rule": rule}
    optimizer, matrix, bias = run(method, updates=2, density=0, weight_decay=0.1, **options)
    generator, expected = torch.Generator().manual_seed(0), torch.ones(24, 10, dtype=torch.float64)
    for _ in range(2):
        grad = torch.randn(24, 10, generator=generator, dtype=torch.float64)
        torch.randn(7, generator=generator, dtype=torch.float64)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * 0.125 * (grad.sign() if rule == "sign_sgd" else grad)
    torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-12)
    state = state_of_matrix(optimizer)
    assert all(isinstance(value, int) for value in state.values())
    _, _, dense = run(method, updates=2, density=0.5, weight_decay=0.1, **options)
    torch.testing.assert_close(bias, dense, rtol=1e-12, atol=1e-12)  # the rest goes on as ever


def test_frugal_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is trained"):
        run("frugal", density=0, inactive_update_rule="no")
    with pytest.raises(ValueError, match="strategy=frugal_block"):
        Online(density=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["online_galore", "online_natural_galore"])
def test_natural_galore_with_a_basis_that_learns(kind: str, shape: tuple[int, int]) -> None:
    """online_galore is Online Subspace Descent; with natural_ its inner rule alone differs."""
    own, moved, _ = run("natural_galore", shape, proj_type=kind, rank=3, update_proj_gap=5, constructor_lr=2e-2)
    known, expected, _ = run("online_subspace", shape, rank=3, update_proj_gap=5, constructor_lr=2e-2)
    rule: Any = own.transforms[0]
    assert isinstance(rule.subspace, Online) and own.base_lr == known.base_lr == 2e-2
    assert isinstance(rule.inner, NaturalAdam) == (kind == "online_natural_galore")
    if kind == "online_galore":
        assert torch.equal(moved, expected)
    else:
        assert not torch.allclose(moved, expected)


def test_what_is_not_known_of_published_code_is_refused() -> None:
    for method, options in (
        ("natural_galore", {"proj_type": "online_galore"}),
        ("flora", {"rank": 4, "beta1": 0.9, "quantization": True}),
    ):
        with pytest.raises(ValueError, match="cannot be run as published"):
            run(method, published=True, **options)


@pytest.mark.parametrize("published", [False, True])
def test_a_basis_learns_with_moments_of_a_byte(published: bool) -> None:
    """Beside exact Adam without decay: the moments of B are codes, and B is near the one with exact moments."""
    bases = {}
    for kind in ("continuous_adam8bit", "continuous_adamw"):
        options: dict[str, Any] = {"proj_type": kind, "rank": 50, "update_proj_gap": 5, "published": published}
        optimizer, _, _ = run("online_subspace", (90, 84), 5, **options)
        state = state_of_matrix(optimizer)
        bases[kind] = tensor_of(state, "basis_right")
        if kind == "continuous_adam8bit":
            assert tensor_of(state, "basis_exp_avg.q8").dtype == torch.uint8
            assert tensor_of(state, "basis_exp_avg_sq.q8").shape == (84, 50)
            assert state["basis_step"] == 4
    exact = bases["continuous_adamw"]
    apart = (bases["continuous_adam8bit"] - exact).norm() / exact.norm()
    assert 0 < apart < 0.05


def test_floras_momentum_in_codes_is_near_the_exact_one() -> None:
    """A signed code is within 1/127 of the largest of its block; a moment is a part of an update that is clipped."""
    moved = {}
    for quantised in (False, True):
        optimizer, matrix, _ = run("flora", (96, 90), quantization=quantised, rank=64, scale_parameter=False)
        state = state_of_matrix(optimizer)
        assert ("exp_avg.q8" in state) == quantised
        moved[quantised] = matrix - 1
    assert 0 < (moved[True] - moved[False]).norm() / moved[False].norm() < 0.03


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_floras_two_compressions_at_once(beta1: float | None) -> None:
    """Four micro-batches an update: the sums are compressed, and with beta1 the first moment too."""
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.ones(12, 10))
    pairs = [("mlp.weight", matrix)]
    optimizer = lowrank_train.optimizer("flora_accum", pairs, lr=1e-2, rank=4, accumulation=4, beta1=beta1)
    for _ in range(3):
        for _ in range(4):
            (matrix * torch.randn(12, 10, generator=generator)).sum().backward()
            assert matrix.grad is None, "compressed and freed as it comes"
        optimizer.step()
    [state] = optimizer.state.values()
    assert ("exp_avg" in state) == bool(beta1)
    assert not torch.equal(matrix.detach(), torch.ones(12, 10))
