"""The kernel that projects a gradient and moves Adam's moments, against its reference: both sides, both storages."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.blockwise import dequantize_blockwise_reference, quantize_blockwise_reference
from lowrank_train.kernels.lifted_update import AdamDirection
from lowrank_train.kernels.projected_adam import Moment, projected_adam_reference
from tests.kernels.triton_runs import TOLERANCE, needs_device, numbers, there

pytest.importorskip("triton")

from lowrank_train.kernels.triton.projected_adam import projected_adam, tile

pytestmark = needs_device
Side = Literal["left", "right"]
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 0.01, "grad_factor": 0.7, "block": 256, "keep_nonzero": True}


def operands(rows: int, columns: int, rank: int, side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradient, basis, and the two moments in float32."""
    basis = numbers(columns if side == "right" else rows, rank, seed=1) * rank**-0.5
    low_shape = (rows, rank) if side == "right" else (rank, columns)
    moments = [numbers(*low_shape, seed=2), numbers(*low_shape, seed=3).square()]
    return numbers(rows, columns, dtype=dtype), basis, moments


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums in another order: by the tolerance of float32, or one unit in the last place of what is stored in less."""
    rtol = TOLERANCE[dtype]["rtol"] if got.dtype is dtype else TOLERANCE[torch.float32]["rtol"]
    torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=1e-5)


def run_both(grad: Tensor, basis: Tensor, moments: list[Moment], side: Side, keep_low: bool) -> list[Any]:
    """(direction, low, norm, first, second) of the kernel and of the reference."""
    results = []
    for project, place in ((projected_adam, there), (projected_adam_reference, torch.clone)):
        first, second = (
            tuple(map(place, moment)) if isinstance(moment, tuple) else place(moment) for moment in moments
        )
        made = project(place(grad), place(basis), first, second, side=side, keep_low=keep_low, **OPTIONS)
        results.append((*made, first, second))
    return results


@pytest.mark.parametrize("shape", [(150, 41, 5), (30, 141, 40), (64, 130, 130), (1, 9, 1)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_in_tensors(shape: tuple[int, int, int], side: Side, dtype: torch.dtype) -> None:
    grad, basis, moments = operands(*shape, side, dtype)
    stored: list[Moment] = [moment.to(dtype) for moment in moments]
    got, expected = run_both(grad, basis, stored, side, keep_low=True)
    assert isinstance(got[0], AdamDirection) and got[0].exp_avg is got[3] and got[0].exp_avg_sq is got[4]
    assert not torch.equal(expected[3], stored[0])
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert_close(ours, theirs, dtype)


CODED = {
    "blocks within rows": (20, 24, 256, "right", True),
    "several tiles of the rank": (20, 24, 512, "right", True),
    "rows within blocks": (70, 24, 64, "right", True),
    "rows within blocks, the last one shorter": (33, 24, 16, "right", True),
    "blocks within rows of the gradient": (24, 512, 7, "left", True),
    "blocks across tiles": (24, 300, 7, "left", False),
}


@pytest.mark.parametrize("case", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_in_codes(case: str, dtype: torch.dtype) -> None:
    """Codes may be neighbours where the sum's order moves a number over the middle between them."""
    rows, columns, rank, side, fits = CODED[case]
    grad, basis, moments = operands(rows, columns, rank, side, dtype)
    low_shape = moments[0].shape
    assert (tile(*low_shape, 256, dtype is not torch.float32) is not None) == fits
    stored = [quantize_blockwise_reference(moment, signed=i == 0) for i, moment in enumerate(moments)]
    got, expected = run_both(grad, basis, stored, side, keep_low=True)
    assert_close(got[0], expected[0], torch.float32)
    assert_close(got[1], expected[1], torch.float32)
    assert_close(got[2], expected[2], torch.float32)
    for place, signed in ((3, True), (4, False)):
        assert_close(got[place][1], expected[place][1], torch.float32)
        assert (got[place][0].cpu() != expected[place][0]).float().mean() < 2e-3
        ours, theirs = (
            dequantize_blockwise_reference(codes.cpu(), largest.cpu(), signed=signed)
            for codes, largest in (got[place], expected[place])
        )
        apart = (ours - theirs).abs().max() / theirs.abs().max()
        assert apart < 0.02  # the widest gap of the code book, signed, is 1.4 %
