"""Kernels of the blockwise 8- and 4-bit codes and of the 8-bit Adam step, against their references in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step_reference
from lowrank_train.kernels.blockwise import dequantize_blockwise_reference, quantize_blockwise_reference
from lowrank_train.kernels.philox import random_16_bits
from tests.kernels.triton_runs import CODES_APART, DEVICE, assert_equal, assert_near, needs_device, numbers, there

pytest.importorskip("triton")

from lowrank_train.kernels.triton.adam_8bit import adam_8bit_step
from lowrank_train.kernels.triton.blockwise import dequantize_blockwise, quantize_blockwise

pytestmark = needs_device
SHAPES = [(20, 256), (7, 300), (5,)]  # whole blocks of two programs, a shorter last block, less than a block
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("signed", "keep_nonzero"), [(True, False), (False, False), (False, True)])
def test_codes_are_the_references(shape: tuple[int, ...], dtype: torch.dtype, signed: bool, keep_nonzero: bool) -> None:
    """Bit for bit: rounding is by comparison, after one division and one product."""
    values = numbers(*shape, dtype=dtype, decades=9)
    values.view(-1)[::7] = 0
    values = values if signed else values.abs()
    codes, largest = quantize_blockwise(there(values), signed=signed, keep_nonzero=keep_nonzero)
    expected = quantize_blockwise_reference(values, signed=signed, keep_nonzero=keep_nonzero)
    assert_equal(codes, expected[0])
    assert_equal(largest, expected[1])
    assert_equal(
        dequantize_blockwise(codes, largest, signed=signed), dequantize_blockwise_reference(*expected, signed=signed)
    )


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1025), (1,)], ids=str)  # odd numbers of codes, two to a byte
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "spacing"), [(8, "linear"), (4, "dynamic"), (4, "linear")])
@pytest.mark.parametrize("signed", [True, False])
def test_other_code_books(shape: tuple[int, ...], dtype: torch.dtype, bits: int, spacing: Any, signed: bool) -> None:
    """Bit for bit, the half byte behind the last number included."""
    values = numbers(*shape, dtype=dtype, decades=3)
    values.view(-1)[::7] = 0
    values, book = values if signed else values.abs(), {"signed": signed, "bits": bits, "spacing": spacing}
    codes, largest = quantize_blockwise(there(values), block=128, **book)
    expected = quantize_blockwise_reference(values, block=128, **book)
    assert_equal(codes, expected[0])
    assert_equal(largest, expected[1])
    decoded = dequantize_blockwise(codes, largest, block=128, shape=shape, **book)
    assert_equal(decoded, dequantize_blockwise_reference(*expected, block=128, shape=shape, **book))


@pytest.mark.parametrize("block", [16, 128, 2048])
def test_other_block_sizes(block: int) -> None:
    values = numbers(3, 1111)
    codes, largest = quantize_blockwise(there(values), signed=True, block=block)
    expected = quantize_blockwise_reference(values, signed=True, block=block)
    assert_equal(codes, expected[0])
    assert_equal(largest, expected[1])
    decoded = dequantize_blockwise(codes, largest, signed=True, block=block)
    assert_equal(decoded, dequantize_blockwise_reference(*expected, signed=True, block=block))


def test_a_transposed_tensor() -> None:
    values = numbers(33, 40).T
    codes, _ = quantize_blockwise(there(values), signed=True)
    assert_equal(codes, quantize_blockwise_reference(values, signed=True)[0])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e-39, 3e38])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy's, of the interpreter, about what is tested
def test_numbers_at_the_ends_and_none_at_all(number: float) -> None:
    """A NaN is in the largest magnitude, so that decoding the block shows it."""
    values = numbers(4, 256)
    values[1, 17] = number
    values[2] = number
    codes, largest = quantize_blockwise(there(values), signed=True)
    expected, expected_largest = quantize_blockwise_reference(values, signed=True)
    assert_equal(largest, expected_largest)
    assert_equal(codes, expected)


def moments(shape: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first, second = numbers(*shape, seed=1, decades=3), numbers(*shape, seed=2, decades=2).square()
    return quantize_blockwise_reference(first, signed=True), quantize_blockwise_reference(second, signed=False)


def assert_same_codes(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert_near(got[1], expected[1])
    assert (got[0].cpu() != expected[0]).float().mean() <= CODES_APART


@pytest.mark.parametrize(  # the decay is of each number by itself, in whatever shape
    ("shape", "decay", "decay_first"),
    [(SHAPES[0], 0.0, True), (SHAPES[1], 0.1, True), (SHAPES[2], 0.1, False)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "seed"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 2**62 + 5)]
)
def test_adam_step(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int | None, decay: float, decay_first: bool
) -> None:
    weight, grad = numbers(*shape, dtype=dtype), numbers(*shape, seed=3, dtype=dtype)
    results = []
    for step, place in ((adam_8bit_step, DEVICE), (adam_8bit_step_reference, torch.device("cpu"))):
        param = weight.to(place, copy=True)
        first, second = (tuple(part.to(place) for part in moment) for moment in moments(shape))
        step(
            param,
            grad.to(place),
            first,
            second,
            step_size=0.03,
            betas=(0.9, 0.99),
            eps=1e-6,
            decay=decay,
            decay_first=decay_first,
            block=256,
            keep_nonzero=True,
            seed=seed,
        )
        results.append((param, first, second))
    (param, first, second), (expected, expected_first, expected_second) = results
    assert_near(param, expected)
    assert (param.cpu() != weight).float().mean() > 0.5  # it does move
    assert_same_codes(first, expected_first)
    assert_same_codes(second, expected_second)


def test_random_bits_are_the_references() -> None:
    """Adding noise to weights of 1 and no step rounds up exactly where noise and remainder make a whole."""
    weight = there(torch.ones(3000, dtype=torch.bfloat16))
    state = [there(quantize_blockwise_reference(torch.zeros(3000), signed=signed)) for signed in (True, False)]
    remainder = 2.0**-9  # a quarter of the distance from 1 to the next bfloat16
    adam_8bit_step(
        weight,
        torch.zeros_like(weight),
        *state,
        step_size=0.0,
        betas=(0.9, 0.99),
        eps=1e-8,
        decay=-remainder,
        decay_first=True,
        block=256,
        keep_nonzero=True,
        seed=77,
    )
    up = random_16_bits(77, 1, 3000, torch.device("cpu")).flatten() + 2**14 >= 2**16
    assert_equal(weight > 1, up)
    assert abs(up.float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 3000) ** 0.5
