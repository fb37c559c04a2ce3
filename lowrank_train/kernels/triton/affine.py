"""Affine 4- and 8-bit codes, made and read in one pass: see kernels/affine.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Size, Tensor

from lowrank_train.kernels import affine
from lowrank_train.kernels.triton.rounding import nearest_whole

TILE = 4096  # numbers of a program: 16 a thread
WARPS = 8
SMALLEST_RANGE = tl.constexpr(affine.SMALLEST_RANGE)


@triton.jit
def encoded(
    values: tl.tensor, drawn: tl.tensor, BITS: tl.constexpr, AT_RANDOM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Codes (ROWS, GROUP), scales and zeros (ROWS,), all float32; drawn: numbers from [0, 1) for AT_RANDOM."""
    levels: tl.constexpr = 2**BITS - 1
    lowest, highest = tl.minimum(tl.min(values, 1), 0.0), tl.maximum(tl.max(values, 1), 0.0)
    spread: tl.constexpr = levels - 1 if AT_RANDOM else levels
    scale = tl.div_rn(tl.maximum(highest - lowest, SMALLEST_RANGE), spread * 1.0)
    zero = tl.div_rn(lowest, scale)
    zero = tl.clamp(tl.ceil(-zero) if AT_RANDOM else -nearest_whole(zero), 0.0, levels)
    whole = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    if AT_RANDOM:
        below = tl.floor(whole)
        whole = below + (drawn < whole - below).to(tl.float32)
    else:
        whole = nearest_whole(whole)
    return tl.clamp(whole + zero[:, None], 0.0, levels), scale, zero


@triton.jit
def quantize_affine_kernel(
    values_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    numel: tl.int64,
    BITS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    groups = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offsets < numel
    values = tl.load(values_ptr + offsets, inside, other=0.0).to(tl.float32)
    drawn = values
    if AT_RANDOM:
        drawn = tl.load(uniform_ptr + offsets, inside, other=0.0).to(tl.float32)
    codes, scale, zero = encoded(values, drawn, BITS, AT_RANDOM)
    codes = tl.where(inside, codes, 0.0).to(tl.uint8)
    if BITS == 4:
        even, odd = tl.split(codes.reshape(ROWS, GROUP // 2, 2))
        pairs = groups[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        tl.store(codes_ptr + pairs, even | (odd << 4), pairs * 2 < numel)
    else:
        tl.store(codes_ptr + offsets, codes, inside)
    tl.store(scale_ptr + groups, scale, groups * GROUP < numel)
    tl.store(zero_ptr + groups, zero.to(tl.uint8), groups * GROUP < numel)


@triton.jit
def dequantize_affine_kernel(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    values_ptr: tl.tensor,
    numel: tl.int64,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    groups = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside, is_group = offsets < numel, groups * GROUP < numel
    if BITS == 4:
        pairs = groups[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        packed = tl.load(codes_ptr + pairs, pairs * 2 < numel, other=0)
        codes = tl.join(packed & 15, packed >> 4).reshape(ROWS, GROUP)
    else:
        codes = tl.load(codes_ptr + offsets, inside, other=0)
    zero = tl.load(zero_ptr + groups, is_group, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + groups, is_group, other=0.0)
    tl.store(values_ptr + offsets, (codes.to(tl.float32) - zero[:, None]) * scale[:, None], inside)


def quantize_affine(values: Tensor, *, bits: int, group: int = 256, uniform: Tensor | None = None) -> affine.Affine:
    values = values.detach().contiguous()
    stored = affine.empty_affine(values.shape, bits=bits, group=group, device=values.device)
    rows, drawn = TILE // group, values if uniform is None else uniform.contiguous()
    with torch.cuda.device_of(values):
        quantize_affine_kernel[(triton.cdiv(len(stored.scale), rows),)](
            values,
            drawn,
            stored.codes,
            stored.scale,
            stored.zero,
            values.numel(),
            bits,
            uniform is not None,
            rows,
            group,
            num_warps=WARPS,
        )
    return stored


def dequantize_affine(stored: affine.Affine, shape: Size | tuple[int, ...], *, bits: int, group: int = 256) -> Tensor:
    values = torch.empty(shape, dtype=torch.float32, device=stored.codes.device)
    rows = TILE // group
    with torch.cuda.device_of(values):
        dequantize_affine_kernel[(triton.cdiv(len(stored.scale), rows),)](
            stored.codes, stored.scale, stored.zero, values, values.numel(), bits, rows, group, num_warps=WARPS
        )
    return values
