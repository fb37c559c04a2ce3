"""Products with a matrix of 8-bit affine codes, decoded tile by tile: see kernels/int8_linear.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels.affine import Affine
from lowrank_train.kernels.triton.products import INTERPRETED, index_type, precision, product
from lowrank_train.kernels.triton.rounding import rounded


@triton.jit
def int8_product_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    summed: tl.tensor,  # length of the axis of W that is summed over
    kept: tl.tensor,  # length of the other
    summed_stride: tl.tensor,
    kept_stride: tl.tensor,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,  # each row of a tile of W lies within one group
    ROWS_SUMMED: tl.constexpr,  # the axis that is summed over is that of the rows
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    SUMMED: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    """out (tokens, kept) = x (tokens, summed) W(summed, kept), W by its strides."""
    token_tile, kept_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    rows = token_tile.to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    first_kept = kept_tile.to(INDEX) * KEPT
    columns = first_kept + tl.arange(0, KEPT)
    total = tl.zeros((TOKENS, KEPT), tl.float32)
    for start in range(0, summed, SUMMED):
        inner = start + tl.arange(0, SUMMED).to(INDEX)
        x = tl.load(
            x_ptr + rows[:, None] * summed + inner[None, :],
            (rows < tokens)[:, None] & (inner < summed)[None, :],
            other=0.0,
        )
        inside = (inner < summed)[:, None] & (columns < kept)[None, :]
        offsets = inner[:, None] * summed_stride + columns[None, :] * kept_stride
        codes = tl.load(codes_ptr + offsets, inside, other=0).to(tl.float32)
        if not ALIGNED:
            groups, exist = offsets // GROUP, inside
        elif ROWS_SUMMED:
            groups, exist = ((inner * summed_stride + first_kept) // GROUP)[:, None], (inner < summed)[:, None]
        else:
            groups, exist = ((columns * kept_stride + start) // GROUP)[None, :], (columns < kept)[None, :]
        zero = tl.load(zero_ptr + groups, exist, other=0).to(tl.float32)
        weight = (codes - zero) * tl.load(scale_ptr + groups, exist, other=0.0)
        total = product(x, rounded(weight, x_ptr.dtype.element_ty), total, PRECISION, WIDEN)
    out = rounded(total, out_ptr.dtype.element_ty)
    inside = (rows < tokens)[:, None] & (columns < kept)[None, :]
    tl.store(out_ptr + rows[:, None] * kept + columns[None, :], out, inside)


def tiles(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """TOKENS, SUMMED, KEPT, warps: low tiles for few tokens, small ones for float32, whose products take registers."""
    if dtype is torch.float32:
        return 32, 32, 32, 4
    return (128, 32, 128, 8) if tokens > 64 else (16, 128, 64, 4)


def int8_product(x: Tensor, weight: Affine, shape: tuple[int, int], *, group: int, input_gradient: bool) -> Tensor:
    m, n = shape
    kept = n if input_gradient else m
    flat = x.contiguous().view(-1, m if input_gradient else n)
    out = torch.empty(len(flat), kept, dtype=x.dtype, device=x.device)
    by_tokens, by_summed, by_kept, warps = tiles(len(flat), x.dtype)
    across = by_kept if input_gradient else by_summed  # the part of a row of W that a tile holds
    strides = (n, 1) if input_gradient else (1, n)
    if len(flat):
        with torch.cuda.device_of(x):
            int8_product_kernel[(triton.cdiv(len(flat), by_tokens), triton.cdiv(kept, by_kept))](
                flat,
                weight.codes,
                weight.scale,
                weight.zero,
                out,
                *flat.shape,
                kept,
                *strides,
                group,
                n % group == 0 and group % across == 0,
                input_gradient,
                index_type(flat, out, weight.codes),
                precision(),
                INTERPRETED,
                by_tokens,
                by_summed,
                by_kept,
                num_warps=warps,
            )
    return out.view(*x.shape[:-1], kept)
