"""The kernel of the linear layer with 8-bit weights against its reference, forward and for the gradient of x."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.affine import Affine, quantize_affine_reference
from lowrank_train.kernels.int8_linear import int8_product_reference
from tests.kernels.triton_runs import TOLERANCE, needs_device, numbers, there

pytest.importorskip("triton")

from lowrank_train.kernels.triton.int8_linear import int8_product

pytestmark = needs_device
# Groups in whole rows and across them, one and several tiles each way, nothing a multiple of anything.
SHAPES = [(20, 512), (33, 85), (130, 256), (1, 300)]


def assert_product(got: Tensor, x: Tensor, weight: Affine, shape: tuple[int, int], input_gradient: bool) -> None:
    """Within the dtype's tolerance of the largest entry: sums of hundreds of products cancel."""
    expected = int8_product_reference(x, weight, shape, group=256, input_gradient=input_gradient)
    tolerance = TOLERANCE[x.dtype]["rtol"] * float(expected.abs().max())
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(  # low tiles for up to 64 tokens in bfloat16; of float32 one and two tiles
    ("tokens", "dtype"), [(5, torch.float32), (37, torch.float32), (5, torch.bfloat16), (70, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("input_gradient", [False, True])
def test_products(shape: tuple[int, int], tokens: int, dtype: torch.dtype, input_gradient: bool) -> None:
    weight = quantize_affine_reference(numbers(*shape) * 0.1, bits=8)
    x = numbers(tokens, shape[0] if input_gradient else shape[1], seed=1, dtype=dtype)
    got = int8_product(there(x), there(weight), shape, group=256, input_gradient=input_gradient)
    assert got.dtype == dtype
    assert_product(got, x, weight, shape, input_gradient)


@pytest.mark.parametrize("input_gradient", [False, True])
def test_leading_dimensions_and_strides(input_gradient: bool) -> None:
    shape = (40, 48)
    weight = quantize_affine_reference(numbers(*shape), bits=8)
    x = numbers(3, shape[0] if input_gradient else shape[1], 2).transpose(1, 2)
    got = int8_product(there(x), there(weight), shape, group=256, input_gradient=input_gradient)
    assert_product(got, x, weight, shape, input_gradient)
