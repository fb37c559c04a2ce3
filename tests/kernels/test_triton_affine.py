"""Kernels of the affine 4- and 8-bit codes, against their references in plain torch."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.kernels.affine import dequantize_affine_reference, quantize_affine_reference
from tests.kernels.triton_runs import assert_equal, needs_device, numbers, there

pytest.importorskip("triton")

from lowrank_train.kernels.triton.affine import dequantize_affine, quantize_affine

pytestmark = needs_device
SHAPES = [(20, 256), (7, 301), (5,)]  # whole groups of two programs, an odd number of elements, less than a group


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("at_random", [False, True])
def test_codes_are_the_references(shape: tuple[int, ...], dtype: torch.dtype, bits: int, at_random: bool) -> None:
    """Bit for bit: every operation is rounded as IEEE 754 says, in the same order."""
    values = numbers(*shape, dtype=dtype, decades=2)
    values.view(-1)[:300] = values.view(-1)[:300].abs() + 3  # a group of one sign
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(4)) if at_random else None
    drawn = there(uniform) if uniform is not None else None
    stored = quantize_affine(there(values), bits=bits, uniform=drawn)
    expected = quantize_affine_reference(values, bits=bits, uniform=uniform)
    assert_equal(stored, expected)
    assert_equal(dequantize_affine(stored, shape, bits=bits), dequantize_affine_reference(expected, shape, bits=bits))


@pytest.mark.parametrize("group", [16, 128, 2048])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_group_sizes(bits: int, group: int) -> None:
    values = numbers(3, 1111)
    stored = quantize_affine(there(values), bits=bits, group=group)
    expected = quantize_affine_reference(values, bits=bits, group=group)
    assert_equal(stored, expected)
    decoded = dequantize_affine(stored, (3, 1111), bits=bits, group=group)
    assert_equal(decoded, dequantize_affine_reference(expected, (3, 1111), bits=bits, group=group))


@pytest.mark.parametrize("bits", [4, 8])
def test_halves_between_two_codes(bits: int) -> None:
    """To even, and groups of zeros or of nearly the same number."""
    values = torch.arange(-60, 2**bits * 2 - 62).repeat(2)[:512] * 0.5
    values[-64:] = 0
    for tested in (values, torch.zeros(300), torch.full((300,), 1e-7)):
        stored = quantize_affine(there(tested), bits=bits, group=64)
        assert_equal(stored, quantize_affine_reference(tested, bits=bits, group=64))


def test_a_transposed_tensor() -> None:
    values = numbers(33, 40).T
    assert_equal(quantize_affine(there(values), bits=4), quantize_affine_reference(values, bits=4))
