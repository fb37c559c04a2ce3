"""Blockwise 8- and 4-bit codes: the code book, nearest values, error bounds, and agreement with bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.blockwise import code_book, dequantize_blockwise, nearest_codes, quantize_blockwise

CPU = torch.device("cpu")
SHAPES = [(256,), (3, 256), (40, 17), (5,), (1, 1000)]  # whole blocks, a shorter last block, less than one block


def numbers(shape: tuple[int, ...], signed: bool) -> Tensor:
    """Over eight decades, with zeros."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(shape, generator=generator) * 10 ** (-8 * torch.rand(shape, generator=generator))
    values.view(-1)[::7] = 0
    return values if signed else values.square()


@pytest.mark.parametrize("signed", [True, False])
def test_code_book_is_a_dynamic_tree(signed: bool) -> None:
    book = code_book(signed, CPU)
    assert (book.diff() > 0).all()
    assert {0.0, 1.0} <= set(book.tolist())
    for decade in range(7):
        pieces = 2**decade if signed else 2 ** (decade + 1)
        inside = ((book > 10.0 ** (decade - 7)) & (book < 10.0 ** (decade - 6))).sum()
        assert inside == pieces
    if signed:  # mirrored, but for the 1
        assert torch.equal(book[book < 0], -book[(book > 0) & (book < 1)].flip(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [True, False])
def test_every_number_gets_the_nearest_value(signed: bool, shape: tuple[int, ...]) -> None:
    values, block = numbers(shape, signed), 256
    codes, largest = quantize_blockwise(values, signed=signed, block=block)
    assert (codes.dtype, codes.shape, len(largest)) == (torch.uint8, values.shape, -(-values.numel() // block))
    decoded = dequantize_blockwise(codes, largest, signed=signed, block=block)
    assert not decoded[values == 0].any()
    book = code_book(signed, CPU).double()
    for part, got, scale in zip(values.flatten().split(block), decoded.flatten().split(block), largest, strict=True):
        assert scale == part.abs().max()
        possible = book * scale.double()
        nearest = (part.double()[:, None] - possible).abs().amin(1)
        torch.testing.assert_close((part.double() - got.double()).abs(), nearest, rtol=1e-4, atol=1e-7 * float(scale))


BOOKS = [(8, "linear"), (4, "dynamic"), (4, "linear")]


def test_code_books_in_numbers() -> None:
    """Those of 4-bit AdamW, arXiv 2309.01507, figure 3 and section 4.1, and evenly spread ones of 256 values."""
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    book = code_book(True, CPU, 4)
    torch.testing.assert_close(book, torch.tensor([*(-x for x in positive[::-1]), 0.0, *positive, 1.0]))
    assert torch.equal(code_book(False, CPU, 4, "linear"), torch.arange(1, 17) / 16)
    assert torch.equal(code_book(False, CPU, 8, "linear"), torch.arange(1, 257) / 256)
    assert torch.equal(code_book(True, CPU, 8, "linear"), torch.arange(-127, 129) / 128)


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (3, 43)])
@pytest.mark.parametrize(("bits", "spacing"), BOOKS)
@pytest.mark.parametrize("signed", [True, False])
def test_every_book_gives_the_nearest_value(signed: bool, bits: int, spacing: Any, shape: tuple[int, ...]) -> None:
    """Found by trying all values in float64; 4-bit codes come two to a byte, the even ones in the low half."""
    values, block, kind = numbers(shape, signed), 64, {"signed": signed, "bits": bits, "spacing": spacing}
    codes, largest = quantize_blockwise(values, block=block, **kind)
    numel = values.numel()
    assert codes.numel() == (numel if bits == 8 else (numel + 1) // 2) and len(largest) == -(-numel // block)
    decoded = dequantize_blockwise(codes, largest, block=block, shape=shape, **kind)
    book = code_book(signed, CPU, bits, spacing)
    for number, part in enumerate(values.flatten().split(block)):
        possible = (book * largest[number]).double()
        nearest = (part.double()[:, None] - possible).abs()
        got = decoded.flatten()[number * block : (number + 1) * block]
        torch.testing.assert_close((part.double() - got.double()).abs(), nearest.amin(1), rtol=1e-4, atol=1e-9)
    if bits == 4:
        chosen = torch.stack((codes & 15, codes >> 4), 1).flatten()[:numel].long()
        assert torch.equal(book[chosen] * largest.repeat_interleave(block)[:numel], decoded.flatten())


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_squares_never_become_zero_unless_all_are(bits: int) -> None:
    values = torch.tensor([1.0, 1e-9, 0.0, 0.0])
    kind = {"signed": False, "bits": bits, "spacing": "linear", "keep_nonzero": True, "block": 4}
    codes, largest = quantize_blockwise(torch.cat((values, torch.zeros(4))), **kind)  # type: ignore[arg-type]
    del kind["keep_nonzero"]
    decoded = dequantize_blockwise(codes, largest, shape=(8,), **kind)  # type: ignore[arg-type]
    assert decoded.tolist() == [1.0, *[2.0**-bits] * 3, *[0.0] * 4]


@pytest.mark.parametrize("signed", [True, False])
def test_error_bound(signed: bool) -> None:
    """Half the widest gap of the book: 0.7 % of a block's largest signed, 0.35 % unsigned; relative in every decade."""
    values = numbers((64, 256), signed)
    decoded = dequantize_blockwise(*quantize_blockwise(values, signed=signed), signed=signed)
    relative = values.abs() / values.abs().amax(1, keepdim=True)
    error = (decoded - values).abs() / values.abs().amax(1, keepdim=True)
    assert error.max() <= (0.0071 if signed else 0.0036)
    for decade in range(1, 7):  # a piece is 0.9 * 10^(decade - 6) / 2^decade wide
        inside = (relative > 10.0 ** (decade - 7)) & (relative < 10.0 ** (decade - 6))
        piece = 0.9 * 10.0 ** (decade - 6) / 2 ** (decade if signed else decade + 1)
        assert inside.any()
        assert error[inside].max() <= 0.76 * piece  # at the border of two decades the gap is up to 1.5 pieces wide


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_decoded_is_encoded_the_same(signed: bool) -> None:
    """As long as the largest magnitude is positive: a signed book has 1, but no -1."""
    values = numbers((9, 300), signed)
    values.view(-1)[::100] = 5.0
    codes, largest = quantize_blockwise(values, signed=signed)
    decoded = dequantize_blockwise(codes, largest, signed=signed)
    again, same_largest = quantize_blockwise(decoded, signed=signed)
    assert torch.equal(same_largest, largest)
    assert torch.equal(again, codes)


def test_zeros_stay_zero() -> None:
    values = torch.zeros(600)
    values[300:] = numbers((300,), True)[1:2]  # the first block is all zeros, the second partly
    for table in (False, True):
        codes, largest = quantize_blockwise(values, signed=True, table=table)
        assert not dequantize_blockwise(codes, largest, signed=True)[:256].any()
    assert largest[0] == 0


@pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1.2e-38, 1e-30, 1e38])
def test_magnitudes_at_the_ends_of_float32(magnitude: float) -> None:
    values = torch.tensor([1.0, 0.5, 0.0, -0.25]) * magnitude
    decoded = dequantize_blockwise(*quantize_blockwise(values, signed=True), signed=True)
    assert (decoded - values).abs().max() <= max(0.0071 * magnitude, 1.2e-38)


def test_made_on_the_cpu_whatever_the_default_device() -> None:
    """What is made once and kept must not be a meta tensor because a model was being planned just then."""
    code_book.cache_clear()
    nearest_codes.cache_clear()
    with torch.device("meta"):
        quantize_blockwise(torch.ones(3, device="cpu"), signed=True)
    assert {part.device.type for part in (code_book(True, CPU), *nearest_codes(True, CPU))} == {"cpu"}


def test_keep_nonzero() -> None:
    """1e-9 of the largest is below the code book; it becomes its least value instead of 0, and 0 stays 0."""
    values = torch.tensor([1.0, 1e-9, 0.0])
    plain, kept = (
        dequantize_blockwise(*quantize_blockwise(values, signed=False, keep_nonzero=keep), signed=False)
        for keep in (False, True)
    )
    assert plain.tolist() == [1.0, 0.0, 0.0]
    assert kept[2] == 0
    assert kept[1] == code_book(False, CPU)[1]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_bitsandbytes(signed: bool, shape: tuple[int, ...]) -> None:
    """The code book bit for bit, decoding bit for bit, and codes code for code through its CPU kernel's table."""
    functional = pytest.importorskip("bitsandbytes.functional")
    book = functional.create_dynamic_map(signed)
    assert torch.equal(code_book(signed, CPU), book)
    values = numbers(shape, signed)
    theirs, state = functional.quantize_blockwise(values, code=book.clone(), blocksize=256)
    ours, largest = quantize_blockwise(values, signed=signed, table=True)
    assert torch.equal(largest, state.absmax)
    assert torch.equal(ours, theirs)
    assert torch.equal(
        dequantize_blockwise(ours, largest, signed=signed), functional.dequantize_blockwise(theirs, state)
    )
