"""One step of Adam on 8-bit moments in one pass, the moments decoded only in registers: see kernels/adam_8bit.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels import blockwise
from lowrank_train.kernels.triton.blockwise import decoded, encoded
from lowrank_train.kernels.triton.rounding import noise_of, random_bfloat16, rounded

TILE = 2048  # numbers of a program: four tensors of them, in float32, lie in its registers
WARPS = 8


@triton.jit
def adam_8bit_step_kernel(
    param_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    first_ptr: tl.tensor,
    first_largest_ptr: tl.tensor,
    second_ptr: tl.tensor,
    second_largest_ptr: tl.tensor,
    signed_book_ptr: tl.tensor,
    signed_nearest_ptr: tl.tensor,
    signed_upper_ptr: tl.tensor,
    book_ptr: tl.tensor,
    nearest_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    numel: tl.int64,
    seed: tl.int64,
    step_size: tl.float32,
    new1: tl.float32,  # 1 - b1
    beta2: tl.float32,
    new2: tl.float32,  # 1 - b2
    eps: tl.float32,
    kept: tl.float32,  # 1 - decay
    DECAY_FIRST: tl.constexpr,
    KEEP_NONZERO: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, is_block = offsets < numel, blocks * BLOCK < numel
    grad = tl.load(grad_ptr + offsets, inside, other=0.0).to(tl.float32)

    largest = tl.load(first_largest_ptr + blocks, is_block, other=0.0)
    first = decoded(tl.load(first_ptr + offsets, inside, other=0), largest, signed_book_ptr)
    first = first + new1 * (grad - first)
    # beyond the end is code 0, which in the signed book is no zero
    codes, largest = encoded(tl.where(inside, first, 0.0), signed_nearest_ptr, signed_upper_ptr, False)
    tl.store(first_ptr + offsets, codes.to(tl.uint8), inside)
    tl.store(first_largest_ptr + blocks, largest, is_block)

    largest = tl.load(second_largest_ptr + blocks, is_block, other=0.0)
    second = decoded(tl.load(second_ptr + offsets, inside, other=0), largest, book_ptr)
    second = second * beta2 + new2 * grad * grad
    codes, largest = encoded(second, nearest_ptr, upper_ptr, KEEP_NONZERO)
    tl.store(second_ptr + offsets, codes.to(tl.uint8), inside)
    tl.store(second_largest_ptr + blocks, largest, is_block)

    param = tl.load(param_ptr + offsets, inside, other=0.0).to(tl.float32)
    if DECAY_FIRST:
        param *= kept
    param -= step_size * tl.div_rn(first, tl.sqrt_rn(second) + eps)
    if not DECAY_FIRST:
        param *= kept
    if AT_RANDOM:
        octets = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK // 8) + tl.arange(0, ROWS * BLOCK // 8)
        noise = noise_of(seed, octets, tl.zeros_like(octets)).reshape(ROWS, BLOCK)
        result = random_bfloat16(param, noise)
    else:
        result = rounded(param, param_ptr.dtype.element_ty)
    tl.store(param_ptr + offsets, result, inside)


def adam_8bit_step(
    param: Tensor,
    grad: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    *,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    decay_first: bool,
    block: int,
    keep_nonzero: bool,
    seed: int | None,
) -> None:
    rows = max(1, TILE // block)
    tables = [
        table
        for signed in (True, False)
        for table in (blockwise.code_book(signed, param.device), *blockwise.nearest_codes(signed, param.device))
    ]
    with torch.cuda.device_of(param):
        adam_8bit_step_kernel[(triton.cdiv(len(first[1]), rows),)](
            param,
            grad.contiguous(),
            *first,
            *second,
            *tables,
            param.numel(),
            seed or 0,
            step_size,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            1 - decay,
            decay_first,
            keep_nonzero,
            seed is not None and param.dtype is torch.bfloat16,
            rows,
            block,
            num_warps=WARPS,
        )
