"""Weight normalisation: what it makes of a step, checked against autograd and against its own definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.optim.direction import Dense
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of
from lowrank_train.optim.weight_norm import Renormalised, WeightNormAdam, initial, renormalised, row_lengths

RATES = Rates(0.1, 0.1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(param: Tensor) -> State:
    return initial(Adam(), param, Slot("", 0, 0.0, param.dtype))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (6,)])
def test_the_lengths_get_the_gradient_of_their_own(shape: tuple[int, ...]) -> None:
    """dL/dg of W = g V / |V| from dL/dW, as autograd has it: after one update the first moment is a tenth of it."""
    values, slope = random(*shape), random(*shape, seed=1)
    lengths = values.norm(dim=-1, keepdim=True).requires_grad_()
    (lengths * values / values.norm(dim=-1, keepdim=True) * slope).sum().backward()
    state = started(values)
    renormalised(Adam(), Dense(torch.zeros_like(values)), slope, state, values)
    assert lengths.grad is not None
    torch.testing.assert_close(tensor_of(state, "length_exp_avg"), 0.1 * lengths.grad)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6,)])
def test_a_step_moves_directions_and_lengths_apart(shape: tuple[int, ...]) -> None:
    """The new direction is that of V + alpha D, the new length |V| + alpha u; `stretch` leads back to V + alpha D."""
    values, along, lengths = random(*shape), random(*shape, seed=1), random(*shape[:-1], 1, seed=2)
    moved, stretch = values + -0.1 * along, torch.ones(*shape[:-1], 1, dtype=torch.float64)
    new_lengths = row_lengths(values) - 0.1 * lengths
    unit = values / row_lengths(values)
    Renormalised(Dense(along), Dense(lengths), unit, stretch).add_to_(values, -0.1)
    torch.testing.assert_close(values, new_lengths * moved / row_lengths(moved))
    torch.testing.assert_close(values * stretch, moved)


def test_raw_is_the_step_to_first_order() -> None:
    values, along, lengths = random(6, 5), random(6, 5, seed=1), random(6, 1, seed=2)
    direction = Renormalised(Dense(along), Dense(lengths), values / row_lengths(values), torch.ones(6, 1).double())
    moved = values.clone()
    direction.add_to_(moved, 1e-7)
    torch.testing.assert_close((moved - values) / 1e-7, direction.raw(), rtol=1e-5, atol=1e-5)


def test_what_the_lengths_learn_lasts_for_one_update() -> None:
    """With a rate of zero the weights return to V, from which the next update starts."""
    weight = nn.Parameter(random(6, 5))
    rule = WeightNormAdam()
    state = rule.init(weight, Slot("", 0, 0.0, weight.dtype))
    with torch.no_grad():
        rule.update(random(6, 5, seed=1), state, weight, RATES).add_to_(weight, -0.1)
        directions = weight * tensor_of(state, "length_stretch")
        assert not torch.allclose(weight, directions)
        rule.update(random(6, 5, seed=2), state, weight, RATES).add_to_(weight, 0.0)
    torch.testing.assert_close(weight.detach(), directions)
