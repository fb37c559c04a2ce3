"""The kernel that adds an update to 8-bit weights, against its reference."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.kernels.affine import quantize_affine_reference
from lowrank_train.kernels.int8_update import int8_update_reference_
from tests.kernels.triton_runs import CODES_APART, assert_near, needs_device, numbers, there

pytest.importorskip("triton")

from lowrank_train.kernels.triton.int8_update import int8_update_

pytestmark = needs_device


@pytest.mark.parametrize("shape", [(20, 256), (7, 301), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [None, 2**60 + 9])
@pytest.mark.parametrize(("group", "decay", "decay_first"), [(256, 0.0, True), (64, 0.1, True), (256, 0.1, False)])
def test_codes_are_the_references(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int | None, group: int, decay: float, decay_first: bool
) -> None:
    """The same random bits decide, but where a fused multiply-add moves a number over the edge."""
    update = numbers(*shape, seed=1, dtype=dtype)
    expected = quantize_affine_reference(numbers(*shape), bits=8, group=group)
    before, got = expected.codes.clone(), there(expected)
    for add, weight, change in ((int8_update_, got, there(update)), (int8_update_reference_, expected, update)):
        add(weight, change, factor=-0.1, decay=decay, decay_first=decay_first, group=group, seed=seed)
    assert_near(got.scale, expected.scale)
    apart = (got.codes.cpu().int() - expected.codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() <= CODES_APART * 10
    assert (got.zero.cpu().int() - expected.zero.int()).abs().max() <= (CODES_APART > 0)
    assert (expected.codes != before).float().mean() > 0.3  # the update does change codes
