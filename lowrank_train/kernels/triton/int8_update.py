"""Decoding weights, adding an update and encoding them again in one pass: see kernels/int8_update.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels.affine import Affine
from lowrank_train.kernels.triton.affine import encoded
from lowrank_train.kernels.triton.rounding import noise_of

TILE = 4096  # numbers of a program: 16 a thread
WARPS = 8


@triton.jit
def int8_update_kernel(
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    update_ptr: tl.tensor,
    numel: tl.int64,
    seed: tl.int64,
    factor: tl.float32,
    kept: tl.float32,  # 1 - decay
    DECAY_FIRST: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    groups = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside, is_group = offsets < numel, groups * GROUP < numel
    zero = tl.load(zero_ptr + groups, is_group, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + groups, is_group, other=0.0)
    weight = (tl.load(codes_ptr + offsets, inside, other=0).to(tl.float32) - zero[:, None]) * scale[:, None]
    change = factor * tl.load(update_ptr + offsets, inside, other=0.0).to(tl.float32)
    if DECAY_FIRST:
        weight = weight * kept + change
    else:
        weight = (weight + change) * kept
    weight = tl.where(inside, weight, 0.0)
    drawn = weight
    if AT_RANDOM:
        octets = tl.program_id(0).to(tl.int64) * (ROWS * GROUP // 8) + tl.arange(0, ROWS * GROUP // 8)
        noise = noise_of(seed, octets, tl.zeros_like(octets)).reshape(ROWS, GROUP)
        drawn = (noise.to(tl.float32) + 0.5) / 65536.0
    codes, scale, zero = encoded(weight, drawn, 8, AT_RANDOM)
    tl.store(codes_ptr + offsets, codes.to(tl.uint8), inside)
    tl.store(scale_ptr + groups, scale, is_group)
    tl.store(zero_ptr + groups, zero.to(tl.uint8), is_group)


def int8_update_(
    weight: Affine, update: Tensor, *, factor: float, decay: float, decay_first: bool, group: int, seed: int | None
) -> None:
    rows = TILE // group
    with torch.cuda.device_of(update):
        int8_update_kernel[(triton.cdiv(len(weight.scale), rows),)](
            weight.codes,
            weight.scale,
            weight.zero,
            update.contiguous(),
            update.numel(),
            seed or 0,
            factor,
            1 - decay,
            decay_first,
            seed is not None,
            rows,
            group,
            num_warps=WARPS,
        )
