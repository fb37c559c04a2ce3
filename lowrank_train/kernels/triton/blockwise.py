"""Blockwise 8- and 4-bit codes of a code book, made and read in one pass: see kernels/blockwise.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Size, Tensor

from lowrank_train.kernels import blockwise

TILE = 4096  # numbers of a program: 16 a thread, which hide the latency of memory, and codes by 16 bytes a thread
WARPS = 8
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def encoded(
    values: tl.tensor, nearest_ptr: tl.tensor, upper_ptr: tl.tensor, KEEP_NONZERO: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Codes, int32 of the shape (ROWS, BLOCK) of `values`, and the largest magnitudes (ROWS,)."""
    largest = tl.max(tl.abs(values), 1)
    broken = tl.sum((values != values).to(tl.int32), 1) > 0  # a maximum passes over NaN
    largest = tl.where(broken, float("nan"), tl.where(largest < TINY, 0.0, largest))
    inverse = tl.where(largest > 0, tl.div_rn(1.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    scaled = values * inverse[:, None]
    beginning = (scaled.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    codes = tl.load(nearest_ptr + beginning).to(tl.int32)
    codes += (scaled > tl.load(upper_ptr + codes)).to(tl.int32)
    if KEEP_NONZERO:
        codes += ((codes == 0) & (scaled > 0)).to(tl.int32)
    return codes, largest


@triton.jit
def decoded(codes: tl.tensor, largest: tl.tensor, book_ptr: tl.tensor) -> tl.tensor:
    """float32 (ROWS, BLOCK)."""
    return tl.load(book_ptr + codes.to(tl.int32)) * largest[:, None]


@triton.jit
def quantize_blockwise_kernel(
    values_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    nearest_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    numel: tl.int64,
    KEEP_NONZERO: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = offsets < numel
    values = tl.load(values_ptr + offsets, inside, other=0.0).to(tl.float32)
    codes, largest = encoded(values, nearest_ptr, upper_ptr, KEEP_NONZERO)
    codes = tl.where(inside, codes, 0).to(tl.uint8)
    if BITS == 4:
        even, odd = tl.split(codes.reshape(ROWS, BLOCK // 2, 2))
        pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(codes_ptr + pairs, even | (odd << 4), pairs * 2 < numel)
    else:
        tl.store(codes_ptr + offsets, codes, inside)
    tl.store(largest_ptr + blocks, largest, blocks * BLOCK < numel)


@triton.jit
def dequantize_blockwise_kernel(
    codes_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    values_ptr: tl.tensor,
    book_ptr: tl.tensor,
    numel: tl.int64,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = offsets < numel
    largest = tl.load(largest_ptr + blocks, blocks * BLOCK < numel, other=0.0)
    if BITS == 4:
        pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        packed = tl.load(codes_ptr + pairs, pairs * 2 < numel, other=0)
        codes = tl.join(packed & 15, packed >> 4).reshape(ROWS, BLOCK)
    else:
        codes = tl.load(codes_ptr + offsets, inside, other=0)
    tl.store(values_ptr + offsets, decoded(codes, largest, book_ptr), inside)


def quantize_blockwise(
    values: Tensor,
    *,
    signed: bool,
    block: int = 256,
    keep_nonzero: bool = False,
    bits: int = 8,
    spacing: blockwise.Spacing = "dynamic",
) -> tuple[Tensor, Tensor]:
    values = values.detach().contiguous()
    shape = values.shape if bits == 8 else (-(-values.numel() // 2),)
    codes = torch.empty(shape, dtype=torch.uint8, device=values.device)
    largest = torch.empty(-(-values.numel() // block), dtype=torch.float32, device=values.device)
    rows, nearest_codes = TILE // block, blockwise.nearest_codes(signed, values.device, bits, spacing)
    with torch.cuda.device_of(values):
        quantize_blockwise_kernel[(triton.cdiv(len(largest), rows),)](
            values, codes, largest, *nearest_codes, values.numel(), keep_nonzero, bits, rows, block, num_warps=WARPS
        )
    return codes, largest


def dequantize_blockwise(
    codes: Tensor,
    largest: Tensor,
    *,
    signed: bool,
    block: int = 256,
    bits: int = 8,
    spacing: blockwise.Spacing = "dynamic",
    shape: Size | tuple[int, ...] | None = None,
) -> Tensor:
    codes = codes.contiguous()
    values = torch.empty(codes.shape if shape is None else shape, dtype=torch.float32, device=codes.device)
    rows, book = TILE // block, blockwise.code_book(signed, codes.device, bits, spacing)
    with torch.cuda.device_of(codes):
        dequantize_blockwise_kernel[(triton.cdiv(len(largest), rows),)](
            codes, largest, values, book, values.numel(), bits, rows, block, num_warps=WARPS
        )
    return values
