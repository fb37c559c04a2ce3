"""Formats of stored state: which piece of a state gets which, what codes stand for, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam, Momentum
from lowrank_train.optim.state_formats import NARROW, piece_of
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of

SLOT = Slot("w", 3, 0.0, torch.float32)
FORMATS: Any = NARROW


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 5)])
def test_each_piece_has_its_own_format(shape: tuple[int, ...], fmt: Any) -> None:
    """By its name: averages of the gradient, of its squares, and what is neither; what is read back has its shape."""
    rule = Stored(Adam(), Storage(first=fmt, second="fp32", min_elements=1))
    state = rule.init(torch.empty(shape), SLOT)
    assert f"exp_avg.{fmt}" in state and tensor_of(state, "exp_avg_sq").dtype == torch.float32
    assert rule.storage.decode("exp_avg", state).shape == shape
    words = ["exp_avg_sq", "square_avg", "exp_avg_var", "exp_inf", "exp_avg", "momentum_buffer", "history"]
    assert [piece_of(word) for word in words] == ["second"] * 4 + ["first"] * 2 + ["other"]


def test_state_that_does_not_begin_with_zeros_is_kept() -> None:
    @dataclass
    class Ones(Momentum):
        def init(self, param: Tensor, slot: Slot) -> State:
            return {"momentum": torch.ones_like(param)}

    for fmt in FORMATS:
        rule = Stored(Ones(), Storage(first=fmt, min_elements=1))
        assert torch.equal(rule.storage.decode("momentum", rule.init(torch.empty(3, 3), SLOT)), torch.ones(3, 3))


def test_codes_of_a_learned_basis_are_its_own() -> None:
    """A subspace that learns by 8-bit Adam keeps codes in the same dictionary; storing the moments leaves them."""
    rule = InSubspace(Online(rank=2, rule="adam8bit"), Stored(Adam(), Storage(min_elements=1)), Backproject())
    state = rule.init(torch.empty(80, 70), SLOT) | {"basis_exp_avg.q8": torch.full((70, 2), 3, dtype=torch.uint8)}
    rule.inner.update(torch.ones(80, 2), state, torch.empty(80, 70), Rates(0.1, 0.1))
    assert tensor_of(state, "basis_exp_avg.q8").eq(3).all()
    assert tensor_of(state, "exp_avg.q8").eq(255).all()  # equal numbers are all the largest of their block


@pytest.mark.parametrize("seed", range(3))
def test_four_bit_moments_by_hand(seed: int) -> None:
    """One block of 8 numbers: the extremes are exact, all else the nearest of the 16 values."""
    values = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    rule = Stored(Adam((0.0, 0.0)), Storage("q4", "q4", min_elements=1, block_q4=8))
    state = rule.init(values, SLOT)
    rule.update(values.clone(), state, values, Rates(0.1, 0.1))
    largest = values.abs().max()
    signed = torch.tensor([0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875])
    book = torch.cat((signed, -signed[1:], torch.ones(1))) * largest
    nearest = book[(values[:, None] - book).abs().argmin(1)]
    torch.testing.assert_close(rule.storage.decode("exp_avg", state), nearest, rtol=1e-6, atol=0)
    squares = values.square() / largest.square()
    ceiling = (squares * 16).round().clamp_min(1) / 16 * largest.square()
    torch.testing.assert_close(rule.storage.decode("exp_avg_sq", state), ceiling, rtol=1e-6, atol=0)
    assert tensor_of(state, "exp_avg.q4").numel() == 4
