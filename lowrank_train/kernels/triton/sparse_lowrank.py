"""Products with W = B A + S whose tiles are made in registers where they are used: see kernels/sparse_lowrank.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels.triton.products import INTERPRETED, index_type, precision, product
from lowrank_train.kernels.triton.rounding import rounded

FEW_TOKENS = 128
"""Up to as many, one tile holds all tokens: each tile of W is then made once, as for a dense W, which never is."""


@triton.jit
def lower_bound(index_ptr: tl.tensor, begin: tl.tensor, end: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """The first place from `begin` on, and `end` at last, where the ascending index is not below what is wanted."""
    span = tl.max(end - begin)
    while span > 0:
        middle = (begin + end) // 2
        is_open = begin < end
        below = tl.load(index_ptr + middle, is_open, other=0) < wanted
        begin = tl.where(is_open & below, middle + 1, begin)
        end = tl.where(is_open & (below == 0), middle, end)
        span = span // 2
    return begin


@triton.jit
def entries(
    index_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    first_column: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """For each place of a tile the number of its entry of S, and whether it has one."""
    starts = row * columns + first_column
    begin = tl.load(begins_ptr + row, row < rows, other=0)
    end = tl.load(begins_ptr + row + 1, row < rows, other=0)
    begin = lower_bound(index_ptr, begin, end, starts)
    end = lower_bound(index_ptr, begin, end, starts + COLUMNS)
    places = row[:, None] * columns + column[None, :]
    begins, ends = tl.broadcast_to(begin[:, None], places.shape), tl.broadcast_to(end[:, None], places.shape)
    number = lower_bound(index_ptr, begins, ends, places)
    inside = (number < ends) & (column < columns)[None, :]
    return number, inside & (tl.load(index_ptr + number, inside, other=-1) == places)


@triton.jit
def weight_tile(
    scaled_ptr: tl.tensor,  # s A (rank, columns), contiguous
    second_ptr: tl.tensor,  # B (rows, rank), contiguous
    values_ptr: tl.tensor,
    index_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> tl.tensor:
    """W from (first_row, first_column) on, (ROWS, COLUMNS) float32, and 0 beyond its edges."""
    row, column = first_row + tl.arange(0, ROWS).to(INDEX), first_column + tl.arange(0, COLUMNS).to(INDEX)
    is_row, is_column = (row < rows)[:, None], (column < columns)[None, :]
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        inner = start + tl.arange(0, RANK).to(INDEX)
        left = tl.load(second_ptr + row[:, None] * rank + inner[None, :], is_row & (inner < rank)[None, :], other=0.0)
        rights = inner[:, None] * columns + column[None, :]
        right = tl.load(scaled_ptr + rights, (inner < rank)[:, None] & is_column, other=0.0)
        tile = product(left, right, tile, PRECISION, WIDEN)
    number, is_entry = entries(index_ptr, begins_ptr, row, column, rows, columns, first_column, COLUMNS)
    return tile + tl.load(values_ptr + number, is_entry, other=0.0).to(tl.float32)


@triton.jit
def dense_matrix_kernel(
    scaled_ptr: tl.tensor,
    second_ptr: tl.tensor,
    values_ptr: tl.tensor,
    index_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    row_tile, column_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    first_row, first_column = row_tile.to(INDEX) * ROWS, column_tile.to(INDEX) * COLUMNS
    tile = weight_tile(
        scaled_ptr, second_ptr, values_ptr, index_ptr, begins_ptr, rows, columns, rank, first_row, first_column,
        INDEX, PRECISION, WIDEN, ROWS, COLUMNS, RANK,
    )  # fmt: skip
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], rounded(tile, out_ptr.dtype.element_ty), inside)


@triton.jit
def sparse_lowrank_product_kernel(
    x_ptr: tl.tensor,  # (tokens, columns), or (tokens, rows) where it is a gradient; contiguous
    scaled_ptr: tl.tensor,
    second_ptr: tl.tensor,
    values_ptr: tl.tensor,
    index_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ROWS_SUMMED: tl.constexpr,  # x W, of a gradient, instead of x W^T
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    token = tl.program_id(1).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    KEPT: tl.constexpr = COLUMNS if ROWS_SUMMED else ROWS
    SUMMED: tl.constexpr = ROWS if ROWS_SUMMED else COLUMNS
    if ROWS_SUMMED:
        kept, summed = columns, rows
    else:
        kept, summed = rows, columns
    first_kept = tl.program_id(0).to(INDEX) * KEPT
    total = tl.zeros((TOKENS, KEPT), tl.float32)
    for start in range(0, summed, SUMMED):
        first_summed = start + tl.zeros((), INDEX)
        if ROWS_SUMMED:
            first_row, first_column = first_summed, first_kept
        else:
            first_row, first_column = first_kept, first_summed
        weight = rounded(
            weight_tile(
                scaled_ptr, second_ptr, values_ptr, index_ptr, begins_ptr, rows, columns, rank, first_row, first_column,
                INDEX, PRECISION, WIDEN, ROWS, COLUMNS, RANK,
            ),
            x_ptr.dtype.element_ty,
        )  # fmt: skip
        inner = first_summed + tl.arange(0, SUMMED)
        inside = (token < tokens)[:, None] & (inner < summed)[None, :]
        x = tl.load(x_ptr + token[:, None] * summed + inner[None, :], inside, other=0.0)
        if not ROWS_SUMMED:
            weight = tl.trans(weight)
        total = product(x, weight, total, PRECISION, WIDEN)
    column = first_kept + tl.arange(0, KEPT)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, column < kept, other=0.0).to(tl.float32)[None, :]
    inside = (token < tokens)[:, None] & (column < kept)[None, :]
    tl.store(out_ptr + token[:, None] * kept + column[None, :], rounded(total, out_ptr.dtype.element_ty), inside)


@triton.jit
def sampled_product_kernel(
    grad_ptr: tl.tensor,  # (tokens, rows), contiguous
    x_ptr: tl.tensor,  # (tokens, columns), contiguous
    index_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The entries of grad^T x that S has; no other number leaves the registers."""
    row_tile, column_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    first_column = column_tile.to(INDEX) * COLUMNS
    row, column = row_tile.to(INDEX) * ROWS + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS).to(INDEX)
        is_token = token < tokens
        grads, xs = token[None, :] * rows + row[:, None], token[:, None] * columns + column[None, :]
        grad = tl.load(grad_ptr + grads, (row < rows)[:, None] & is_token[None, :], other=0.0)
        x = tl.load(x_ptr + xs, is_token[:, None] & (column < columns)[None, :], other=0.0)
        total = product(grad, x, total, PRECISION, WIDEN)
    number, is_entry = entries(index_ptr, begins_ptr, row, column, rows, columns, first_column, COLUMNS)
    tl.store(out_ptr + number, rounded(total, out_ptr.dtype.element_ty), is_entry)


def row_begins(index: Tensor, rows: int, columns: int) -> Tensor:
    """The number of the first entry of each row, and that of all: (rows + 1,) int32."""
    starts = torch.arange(rows + 1, dtype=torch.int64, device=index.device) * columns
    return torch.searchsorted(index, starts.to(index.dtype), out_int32=True)


def dense_matrix(scaled: Tensor, second: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """B A + S, rounded once."""
    (rank, columns), rows = scaled.shape, len(second)
    out, begins = torch.empty(rows, columns, dtype=second.dtype, device=second.device), row_begins(index, rows, columns)
    side = 64 if second.dtype is torch.float32 else 128
    with torch.cuda.device_of(out):
        dense_matrix_kernel[(triton.cdiv(rows, side), triton.cdiv(columns, side))](
            scaled.contiguous(), second.contiguous(), values, index, begins, out, rows, columns, rank,
            index_type(out), precision(), INTERPRETED, side, side, 32, num_warps=8,
        )  # fmt: skip
    return out


def sparse_lowrank_product(
    x: Tensor, scaled: Tensor, second: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, input_gradient: bool
) -> Tensor:
    """x W^T + bias, or x W where x is the gradient of that."""
    (rank, columns), rows, tokens = scaled.shape, len(second), len(x)
    kept = columns if input_gradient else rows
    out, begins = torch.empty(tokens, kept, dtype=x.dtype, device=x.device), row_begins(index, rows, columns)
    of_tokens = min(FEW_TOKENS, max(16, triton.next_power_of_2(tokens)))
    side = 32 if x.dtype is torch.float32 else 64
    with torch.cuda.device_of(out):
        sparse_lowrank_product_kernel[(triton.cdiv(kept, side), triton.cdiv(tokens, of_tokens))](
            x.contiguous(), scaled.contiguous(), second.contiguous(), values, index, begins,
            x if bias is None else bias, out, tokens, rows, columns, rank, bias is not None, input_gradient,
            index_type(x, out, torch.empty(rows, columns, device="meta")), precision(), INTERPRETED,
            of_tokens, side, side, 32, num_warps=4,
        )  # fmt: skip
    return out


def sampled_product(grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The entries of grad^T x at the flat indices."""
    (tokens, rows), columns = grad.shape, x.shape[1]
    out, begins = torch.empty(len(index), dtype=x.dtype, device=x.device), row_begins(index, rows, columns)
    side = 32 if x.dtype is torch.float32 else 128
    with torch.cuda.device_of(out):
        sampled_product_kernel[(triton.cdiv(rows, side), triton.cdiv(columns, side))](
            grad.contiguous(), x.contiguous(), index, begins, out, tokens, rows, columns,
            index_type(grad, x, torch.empty(rows, columns, device="meta")), precision(), INTERPRETED,
            32, side, side, num_warps=4 if side == 32 else 8,
        )  # fmt: skip
    return out
