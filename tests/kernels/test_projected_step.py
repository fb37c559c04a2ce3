"""The operations of a projected step and of 8-bit Adam in plain torch, against the optimizer's own parts in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step
from lowrank_train.kernels.affine import quantize_affine
from lowrank_train.kernels.blockwise import quantize_blockwise
from lowrank_train.kernels.int8_update import int8_update_
from lowrank_train.kernels.lifted_update import AdamDirection, Residual, lifted_update_
from lowrank_train.kernels.projected_adam import projected_adam
from lowrank_train.optim.direction import Dense, LineScaled, Product, Sum
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of

Side = Literal["left", "right"]
SHAPES = [(24, 9, 4), (9, 24, 4), (16, 16, 16), (7, 5, 1)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of at most 24 terms of the size of one


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(low: Tensor, basis: Tensor, side: Side) -> Product:
    return Product(low, basis.T) if side == "right" else Product(basis, low)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_projected_adam_moves_moments_as_adam_does(shape: tuple[int, int, int], side: Side) -> None:
    rows, columns, rank = shape
    grad, basis = numbers(rows, columns), numbers(columns if side == "right" else rows, rank, seed=1)
    low = 0.5 * (grad @ basis if side == "right" else basis.T @ grad)
    rule = Adam(betas=(0.8, 0.95))
    state: State = {"step": 3, "exp_avg": numbers(*low.shape, seed=2), "exp_avg_sq": numbers(*low.shape, seed=3) ** 2}
    first, second = tensor_of(state, "exp_avg").clone(), tensor_of(state, "exp_avg_sq").clone()
    rule.take_in(low, state)
    options = {"side": side, "betas": (0.8, 0.95), "eps": 0.1, "grad_factor": 0.5}
    made, kept, norm = projected_adam(grad, basis, first, second, keep_low=True, **options)
    torch.testing.assert_close(first, tensor_of(state, "exp_avg"), **EXACT)
    torch.testing.assert_close(second, tensor_of(state, "exp_avg_sq"), **EXACT)
    torch.testing.assert_close(kept, low, **EXACT)
    torch.testing.assert_close(norm, low.square().sum().sqrt(), **EXACT)
    assert isinstance(made, AdamDirection) and made.exp_avg is first and made.exp_avg_sq is second
    assert projected_adam(grad, basis, first, second, **options).low is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("residual", ["none", "rows", "columns", "sign"])
@pytest.mark.parametrize("decay_first", [True, False])
def test_lifted_update_adds_the_directions_of_the_lifts(
    shape: tuple[int, int, int], side: Side, residual: str, decay_first: bool
) -> None:
    rows, columns, rank = shape
    param, grad = numbers(rows, columns), numbers(rows, columns, seed=1)
    basis = numbers(columns if side == "right" else rows, rank, seed=2)
    first, low = (numbers(*((rows, rank) if side == "right" else (rank, columns)), seed=seed) for seed in (3, 4))
    second, lr, decay = first.square() + 0.5, 0.1, 0.03
    direction = product(first / (second.sqrt() + 0.2), basis, side).scaled(0.25)
    expected = param * (1 - decay) if decay_first else param.clone()
    extra = None
    if residual == "sign":
        extra = Residual(grad, -lr * 0.5, low=low)
        Sum(direction, Dense((grad - product(low, basis, side).raw()).sign(), factor=0.5)).add_to_(expected, -lr)
    elif residual != "none":
        line = numbers(*((rows, 1) if residual == "rows" else (1, columns)), seed=5).abs()
        extra = Residual(grad, -lr, line=line)
        Sum(direction, LineScaled(grad, line)).add_to_(expected, -lr)
    else:
        direction.add_to_(expected, -lr)
    if not decay_first:
        expected *= 1 - decay
    small, options = AdamDirection(first, second, 0.2), {"decay": decay, "decay_first": decay_first}
    lifted_update_(param, small, basis, side=side, factor=-lr * 0.25, residual=extra, **options)
    torch.testing.assert_close(param, expected, **EXACT)


@pytest.mark.parametrize("seed", [None, 4])
def test_lifted_update_of_codes(seed: int | None) -> None:
    """What int8_update_ makes of the same change: to one code, since the change is summed up in another dtype here."""
    param, basis, small = numbers(20, 64), numbers(64, 3, seed=1), numbers(20, 3, seed=2)
    lifted, added = (quantize_affine(param, bits=8, group=64) for _ in range(2))
    options = {"decay": 0.1, "group": 64, "seed": seed}
    lifted_update_(lifted, small, basis, side="right", factor=-0.1, **options)
    int8_update_(added, small @ basis.T, factor=-0.1, **options)
    torch.testing.assert_close(lifted.scale, added.scale, rtol=1e-6, atol=0)
    apart = (lifted.codes.int() - added.codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 2e-3
    assert (lifted.codes != quantize_affine(param, bits=8, group=64).codes).float().mean() > 0.5


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("decay_first", [True, False])
@pytest.mark.parametrize("shape", [(20, 300), (3, 100)], ids=str)
def test_8bit_step_is_that_of_stored_adam(shape: tuple[int, int], eps_inside: bool, decay_first: bool) -> None:
    """Ten steps; weights within float32's rounding of sums of ten, and codes that may be neighbours here and there."""
    betas, lr, decay = (0.9, 0.99), 0.01, 0.1
    rule = Stored(Adam(betas, 1e-6, eps_inside, decay_first), Storage(min_elements=1))
    param = numbers(*shape).float()
    ours = param.clone()
    state = rule.init(param, Slot("w", 0, 0.0, torch.float32))
    first, second = (quantize_blockwise(torch.zeros(shape), signed=signed) for signed in (True, False))
    for step in range(1, 11):
        grad = numbers(*shape, seed=step).float()
        rule.apply(grad, state, param, Rates(lr, lr), decay=decay * lr)
        correction1, root2 = 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5
        adam_8bit_step(
            ours,
            grad,
            first,
            second,
            step_size=lr * root2 / correction1,
            betas=betas,
            eps=1e-6 * root2 if eps_inside else 1e-6,
            decay=decay * lr,
            decay_first=decay_first,
        )
    torch.testing.assert_close(ours, param, rtol=1e-5, atol=2e-4)  # a neighbouring code moves a weight by 1 % of lr
    assert (ours - param).abs().mean() < 1e-6
    assert (first[0] != tensor_of(state, "exp_avg.q8")).float().mean() < 1e-3
    assert (second[0] != tensor_of(state, "exp_avg_sq.q8")).float().mean() < 1e-3


def test_8bit_step_of_bfloat16_weights_on_average() -> None:
    """Steps of a thousandth of the distance between two weights are lost to the nearest, and not at random."""
    step, weights = 2.0**-17, 20_000
    nearest, random = torch.ones(weights, dtype=torch.bfloat16), torch.ones(weights, dtype=torch.bfloat16)
    grad = torch.ones(weights)
    for count in range(1, 21):
        for param, seed in ((nearest, None), (random, count)):
            first = quantize_blockwise(torch.ones(weights), signed=True)
            second = quantize_blockwise(torch.ones(weights), signed=False)
            options = {"step_size": step, "betas": (0.9, 0.9), "eps": 1e-12}
            adam_8bit_step(param, grad, first, second, seed=seed, **options)
    assert (nearest == 1).all()
    moved = 1 - random.double().mean()
    deviation = (20 * step * 2**-8 / weights) ** 0.5  # each step goes down by 2^-8 with probability step * 2^8
    assert abs(moved - 20 * step) < 5 * deviation
