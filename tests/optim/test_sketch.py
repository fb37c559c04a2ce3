"""Compressed accumulation: linear in the gradient, unbiased, and the rule sees a whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.moments import Momentum
from lowrank_train.optim.sketch import LiftFirst
from lowrank_train.optim.subspace.random import Gaussian, Orthonormal
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of

RATES = Rates(1.0, 1.0)
SHAPES = [(9, 6), (6, 9), (7, 7)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(rule: InSubspace, like: Tensor, seed: int = 3) -> State:
    return rule.init(like, Slot("", seed, 0.0, like.dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_of_sketches_is_the_sketch_of_the_sum(shape: tuple[int, int]) -> None:
    """All micro-batches of an update meet the same random matrix."""
    first, second = random(*shape), random(*shape, seed=1)
    rule = InSubspace(Gaussian(rank=3, every=1), Adafactor(), LiftFirst())
    state, other = started(rule, first), started(rule, first)
    one_by_one = rule.compress(first, state) + rule.compress(second, state)
    torch.testing.assert_close(one_by_one, rule.compress(first + second, other))
    assert one_by_one.numel() == 3 * max(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_nothing_is_lost(shape: tuple[int, int]) -> None:
    grad = random(*shape)
    rule = InSubspace(Orthonormal(rank=min(shape), every=1), Momentum(0.0), LiftFirst())
    state = started(rule, grad)
    direction = rule.update(rule.compress(grad, state), state, grad, RATES)
    torch.testing.assert_close(direction.tensor(), grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_unbiased(shape: tuple[int, int]) -> None:
    """The mean over many draws is the gradient, within four standard errors; every update draws anew."""
    grad, draws = random(*shape), 2000
    rule = InSubspace(Gaussian(rank=4, every=1), Momentum(0.0), LiftFirst())
    state = started(rule, grad)
    seen = torch.stack(
        [rule.update(rule.compress(grad, state), state, grad, RATES).tensor().clone() for _ in range(draws)]
    )
    assert ((seen.mean(0) - grad).abs() < 4.5 * seen.std(0) / draws**0.5).all()


def test_the_state_is_that_of_the_whole_matrix_and_of_a_basis() -> None:
    rule = InSubspace(Gaussian(rank=3, every=1), Adafactor(), LiftFirst())
    state = started(rule, random(9, 6))
    assert tensor_of(state, "exp_avg_sq_row").shape == (9,)
    assert tensor_of(state, "exp_avg_sq_col").shape == (6,)
    assert tensor_of(state, "basis_right").shape == (6, 3)
