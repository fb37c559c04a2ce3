"""The kernel that ends a projected step against its reference: both sides, every residual, both roundings."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.affine import Affine, dequantize_affine_reference, quantize_affine_reference
from lowrank_train.kernels.lifted_update import AdamDirection, Residual, lifted_update_reference_
from tests.kernels.triton_runs import DEVICE, TOLERANCE, needs_device, numbers, there

pytest.importorskip("triton")

from lowrank_train.kernels.triton.lifted_update import lifted_update_

pytestmark = needs_device
Side = Literal["left", "right"]
# One tile and several each way, more than one tile of the rank, nothing a multiple of anything.
SHAPES = [(150, 41, 5), (30, 141, 40), (64, 128, 16), (1, 9, 1)]
DTYPES = [torch.float32, torch.bfloat16]


def operands(shape: tuple[int, int, int], side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, basis, and the two moments of the small gradient."""
    rows, columns, rank = shape
    basis = numbers(columns if side == "right" else rows, rank, seed=1, dtype=dtype) * rank**-0.5
    low_shape = (rows, rank) if side == "right" else (rank, columns)
    return numbers(rows, columns, dtype=dtype), basis, numbers(*low_shape, seed=2), numbers(*low_shape, seed=3).square()


def updated(param: Any, small: Any, basis: Tensor, **options: Any) -> tuple[Any, Any]:
    """The weights after the kernel, and after the reference."""
    options = {
        "residual": None,
        "decay": 0.0,
        "decay_first": True,
        "group": 256,
        "seed": None,
        "factor": -0.3,
    } | options
    expected = Affine(*map(torch.clone, vars(param).values())) if isinstance(param, Affine) else param.clone()
    got = there(param)
    lifted_update_reference_(expected, small, basis, **options)
    if isinstance(small, AdamDirection):
        small = AdamDirection(there(small.exp_avg), there(small.exp_avg_sq), small.eps)
    else:
        small = there(small)
    if (residual := options["residual"]) is not None:
        parts = {
            name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in vars(residual).items()
        }
        options["residual"] = Residual(**parts)
    lifted_update_(got, small, there(basis), **options)
    return got if isinstance(got, Affine) else got.cpu(), expected


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Sums of some numbers of the size of one, in another order, beside the tolerance of the dtype."""
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[got.dtype]["rtol"], atol=1e-5)


@pytest.mark.parametrize(  # the decay is of each number by itself, in whatever shape
    ("shape", "decay", "decay_first"),
    [(SHAPES[0], 0.0, True), (SHAPES[1], 0.1, True), (SHAPES[2], 0.1, False), (SHAPES[3], 0.0, True)],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_back_projection_of_moments(
    shape: tuple[int, int, int], side: Side, dtype: torch.dtype, decay: float, decay_first: bool
) -> None:
    param, basis, first, second = operands(shape, side, dtype)
    small = AdamDirection(first, second, 0.1)
    assert_same(*updated(param, small, basis, side=side, decay=decay, decay_first=decay_first))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_back_projection_of_a_direction_in_the_basis_of_another_dtype(side: Side, dtype: torch.dtype) -> None:
    param, basis, first, _ = operands((70, 50, 9), side, dtype)
    assert_same(*updated(param, first, basis.float(), side=side))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lines", [(45, 1), (1, 140), (1, 1)], ids=str)
def test_residual_scaled_by_lines(side: Side, dtype: torch.dtype, lines: tuple[int, int]) -> None:
    param, basis, first, second = operands((45, 140, 7), side, dtype)
    residual = Residual(numbers(45, 140, seed=5, dtype=dtype), -0.2, line=numbers(*lines, seed=6).abs())
    assert_same(*updated(param, AdamDirection(first, second, 0.1), basis, side=side, residual=residual))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_of_the_residual(side: Side, dtype: torch.dtype) -> None:
    """But where the residual is so near to 0 that the order of the sum decides."""
    param, basis, first, second = operands((45, 140, 7), side, dtype)
    grad, low = numbers(45, 140, seed=5, dtype=dtype), numbers(*first.shape, seed=6, dtype=dtype)
    residual = Residual(grad, -0.2, low=low)
    got, expected = updated(param, AdamDirection(first, second, 0.1), basis, side=side, residual=residual)
    back = low.float() @ basis.float().T if side == "right" else basis.float() @ low.float()
    clear = (grad.float() - back).abs() > 1e-5
    assert clear.float().mean() > 0.99
    assert_same(got[clear], expected[clear])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_random_rounding(shape: tuple[int, int, int], side: Side) -> None:
    """With the reference's random bits; a factor of 0 leaves the decay alone, which moves nothing when rounded."""
    param, basis, first, _ = operands(shape, side, torch.bfloat16)
    got, expected = updated(param, first, basis, side=side, factor=0.0, decay=1e-3, seed=2**61 + 3)
    assert torch.equal(got, expected)
    assert shape[0] == 1 or 0.05 < (got != param).float().mean() < 0.5
    assert_same(*updated(param, first, basis, side=side, seed=2**61 + 3))


@pytest.mark.parametrize(("columns", "group"), [(256, 256), (512, 256), (192, 64), (300, 256), (512, 512)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, 2**59 + 1])
def test_weights_in_codes(columns: int, group: int, side: Side, dtype: torch.dtype, seed: int | None) -> None:
    """Codes may be neighbours where the order of a sum, or a fused multiply-add, moves a number over the edge."""
    shape = (37, columns)
    weights, basis, first, second = operands((*shape, 6), side, dtype)
    param = quantize_affine_reference(weights.float(), bits=8, group=group)
    residual = Residual(numbers(*shape, seed=5, dtype=dtype), -0.2, line=numbers(1, columns, seed=6).abs())
    options = {"side": side, "residual": residual, "group": group, "seed": seed, "decay": 0.1}
    got, expected = updated(param, AdamDirection(first, second, 0.1), basis, **options)
    torch.testing.assert_close(got.scale.cpu(), expected.scale, rtol=1e-5, atol=1e-6)
    apart = (got.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 2e-3
    before, after = (dequantize_affine_reference(one, shape, bits=8, group=group) for one in (param, expected))
    assert (after - before).abs().mean() > expected.scale.mean()  # the update is larger than what may differ
