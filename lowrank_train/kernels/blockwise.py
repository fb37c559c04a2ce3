"""Blockwise 8- and 4-bit storage with a code book: the reference in plain torch, and where a kernel runs."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.kernels.affine import pack
from lowrank_train.kernels.dispatch import is_tile, runs_kernel

TABLE = 65535  # bitsandbytes' CPU kernel looks codes up in a table of 65,536 values evenly spread from -1 to 1

Spacing = Literal["dynamic", "linear"]


@functools.cache
def code_book(signed: bool, device: torch.device, bits: int = 8, spacing: Spacing = "dynamic") -> Tensor:
    """The 2^bits values in [-1, 1], ascending, float32, that a code stands for.

    dynamic: a decade 10^(i-D) .. 10^(i-D+1), i = 0..D-1, D = bits - 1, is cut into 2^i equal pieces (2^(i+1) unsigned),
        and the middle of each is a value; signed books mirror them; 0 and 1 are added. Small magnitudes keep a small
        relative error, large ones get many values. Dettmers, arXiv 1511.04561, section 2; in this form arXiv
        2110.02861, section 2.2, and with 4 bits arXiv 2309.01507. The same numbers bit for bit as bitsandbytes'
        `create_dynamic_map`, whose order of float32 operations is kept for that.
    linear: evenly spread; unsigned (i + 1) / 2^bits, without 0 (arXiv 2309.01507, section 4.1: what is divided by its
        root must not become 0); signed from -1 + 2^(1-bits) to 1, with 0.
    """
    if spacing == "linear":
        whole = torch.arange(2**bits, dtype=torch.float32, device="cpu")
        half = 2 ** (bits - 1)
        return ((whole - (half - 1)) / half if signed else (whole + 1) / 2**bits).to(device)
    values = [torch.tensor([0.0, 1.0], device="cpu")]  # whatever device is the default when it is first needed
    for decade in range(bits - 1):
        pieces = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, pieces + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (decade - bits + 2) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    book = torch.cat(values).sort().values
    assert len(book) == 2**bits
    return book.to(device)


@functools.cache
def nearest_codes(
    signed: bool, device: torch.device, bits: int = 8, spacing: Spacing = "dynamic"
) -> tuple[Tensor, Tensor]:
    """For the upper half of every float32: the lowest code nearest to a number that begins so, uint8 (65536,); and the
    numbers between two codes, above which the next code is nearer, (2^bits,).

    Numbers that share the sign, the exponent and 7 bits of the mantissa lie closer together than codes do, so that one
    comparison is left to make: 20 times faster on the CPU than a binary search among the 255 middles.
    """
    book = code_book(signed, torch.device("cpu"), bits, spacing)
    middles = (book[:-1] + book[1:]) / 2
    lower = torch.arange(2**16, dtype=torch.int64, device="cpu") << 16
    ends = torch.stack((lower, lower + 0xFFFF)).to(torch.uint32).view(torch.float32)
    ends = torch.where(ends.isfinite().all(0), ends, 0.0)  # no number from [-1, 1] begins like an infinity
    first, last = (torch.bucketize(end, middles) for end in (ends.amin(0), ends.amax(0)))
    assert int((last - first).max()) <= 1
    upper = torch.cat((middles, torch.tensor([torch.inf], device="cpu")))
    return first.to(torch.uint8).to(device), upper.to(device)


@functools.cache
def code_pairs(signed: bool, device: torch.device, spacing: Spacing) -> Tensor:
    """The two values that a byte of two 4-bit codes stands for, the even one in the low half, as one int64: (256,)."""
    book = code_book(signed, torch.device("cpu"), 4, spacing)
    pairs = torch.stack((book.repeat(16), book.repeat_interleave(16)), 1)
    return pairs.view(torch.int64).flatten().to(device)  # is looked up twice as fast as rows of two


def quantize_blockwise(
    values: Tensor,
    *,
    signed: bool,
    block: int = 256,
    keep_nonzero: bool = False,
    table: bool = False,
    bits: int = 8,
    spacing: Spacing = "dynamic",
) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and the largest magnitude of every block, (blocks,) float32.

    8-bit codes have the shape of `values`; 4-bit ones lie two in a byte, (ceil(numel / 2),), and need an even block.
    Blocks run over the flattened tensor; the last one may be shorter. code = nearest value of the book to x / largest
    (the lower of two that are equally near). A block of zeros, or of numbers below 1.2e-38, whose reciprocal float32
    cannot hold, gets the largest magnitude 0.
    keep_nonzero: what is not zero does not become zero. Unsigned books only; the linear one has no zero anyhow.
    table: round x / largest to a multiple of 2/65535 first, as bitsandbytes 0.50 does on the CPU, where 0 becomes
        1.6e-5 (unsigned) or 2.1e-5 of the block's largest. 8-bit dynamic codes only; has no kernel.
    """
    keep_nonzero = keep_nonzero and spacing == "dynamic"
    if not table and is_tile(block) and runs_kernel(values):
        from lowrank_train.kernels.triton import blockwise

        return blockwise.quantize_blockwise(
            values, signed=signed, block=block, keep_nonzero=keep_nonzero, bits=bits, spacing=spacing
        )
    return quantize_blockwise_reference(
        values, signed=signed, block=block, keep_nonzero=keep_nonzero, table=table, bits=bits, spacing=spacing
    )


def quantize_blockwise_reference(
    values: Tensor,
    *,
    signed: bool,
    block: int = 256,
    keep_nonzero: bool = False,
    table: bool = False,
    bits: int = 8,
    spacing: Spacing = "dynamic",
) -> tuple[Tensor, Tensor]:
    """`quantize_blockwise` in plain torch."""
    flat = values.detach().flatten().float()
    blocks = -(-flat.numel() // block)
    padded = torch.nn.functional.pad(flat, (0, blocks * block - flat.numel())).view(blocks, block)
    largest = torch.maximum(padded.amax(1), padded.amin(1).neg_())
    largest = torch.where(largest < torch.finfo(torch.float32).tiny, 0.0, largest)
    scaled = padded * torch.where(largest > 0, 1 / largest, 0.0)[:, None]
    if table:
        scaled = (scaled + 1).mul_(0.5).mul_(TABLE).add_(0.5).floor_().div_(TABLE).mul_(2).sub_(1)
    scaled = scaled.flatten()
    nearest, upper = nearest_codes(signed, values.device, bits, spacing)
    codes = nearest.index_select(0, (scaled.view(torch.int32) >> 16) & 0xFFFF)
    codes += scaled > upper.index_select(0, codes.int())
    if keep_nonzero:
        codes += (codes == 0) & (scaled > 0)
    codes = codes[: flat.numel()]
    return (codes.view(values.shape) if bits == 8 else pack(codes)), largest


def dequantize_blockwise(
    codes: Tensor,
    largest: Tensor,
    *,
    signed: bool,
    block: int = 256,
    bits: int = 8,
    spacing: Spacing = "dynamic",
    shape: Size | tuple[int, ...] | None = None,
) -> Tensor:
    """The float32 values that codes stand for, in the shape of 8-bit `codes`; 4-bit ones do not tell it: `shape`."""
    shape = codes.shape if shape is None else shape
    if is_tile(block) and runs_kernel(codes, largest):
        from lowrank_train.kernels.triton import blockwise

        return blockwise.dequantize_blockwise(
            codes, largest, signed=signed, block=block, bits=bits, spacing=spacing, shape=shape
        )
    return dequantize_blockwise_reference(
        codes, largest, signed=signed, block=block, bits=bits, spacing=spacing, shape=shape
    )


def dequantize_blockwise_reference(
    codes: Tensor,
    largest: Tensor,
    *,
    signed: bool,
    block: int = 256,
    bits: int = 8,
    spacing: Spacing = "dynamic",
    shape: Size | tuple[int, ...] | None = None,
) -> Tensor:
    """`dequantize_blockwise` in plain torch."""
    shape = Size(codes.shape if shape is None else shape)
    if bits == 8:
        flat = code_book(signed, codes.device, bits, spacing).index_select(0, codes.flatten().int())
    else:
        flat = (
            code_pairs(signed, codes.device, spacing).index_select(0, codes.int()).view(torch.float32)[: shape.numel()]
        )
    whole = flat.numel() // block * block
    flat[:whole].view(-1, block).mul_(largest[: whole // block, None])
    if whole < flat.numel():
        flat[whole:].mul_(largest[-1])
    return flat.view(shape)
