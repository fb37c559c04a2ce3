"""Projection of a gradient whose last act is Adam's step on what it made: see kernels/projected_adam.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels.blockwise import code_book, nearest_codes
from lowrank_train.kernels.lifted_update import AdamDirection
from lowrank_train.kernels.projected_adam import Moment, Projected
from lowrank_train.kernels.triton.adam_8bit import adam_8bit_step
from lowrank_train.kernels.triton.blockwise import decoded, encoded
from lowrank_train.kernels.triton.products import INTERPRETED, index_type, precision, product
from lowrank_train.kernels.triton.rounding import rounded
from lowrank_train.kernels.triton.tuning import Tiles, chosen, rounded_up


@triton.jit
def projected_adam_kernel(
    left_ptr: tl.tensor,  # (rows, summed): the gradient, or the basis on its side
    right_ptr: tl.tensor,  # (summed, columns): the basis, or the gradient
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    first_largest_ptr: tl.tensor,
    second_largest_ptr: tl.tensor,
    direction_ptr: tl.tensor,
    low_ptr: tl.tensor,
    squares_ptr: tl.tensor,  # one for each tile: the sum of the squares of the small gradient
    signed_book_ptr: tl.tensor,
    signed_nearest_ptr: tl.tensor,
    signed_upper_ptr: tl.tensor,
    book_ptr: tl.tensor,
    nearest_ptr: tl.tensor,
    upper_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    summed: tl.tensor,
    left_stride_row: tl.tensor,
    left_stride_summed: tl.tensor,
    right_stride_summed: tl.tensor,
    right_stride_column: tl.tensor,
    new1: tl.float32,  # 1 - b1
    beta2: tl.float32,
    new2: tl.float32,  # 1 - b2
    eps: tl.float32,
    grad_factor: tl.float32,
    GRADIENT_IS_LEFT: tl.constexpr,
    MOMENTS: tl.constexpr,  # "codes", "tensors", or "none": then the small gradient alone is made
    KEEP_NONZERO: tl.constexpr,
    KEEP_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
) -> None:
    """Tiles that read the same part of the gradient run one after the other: it comes from memory once."""
    if GRADIENT_IS_LEFT:
        row_tile, column_tile = tl.program_id(1), tl.program_id(0)
    else:
        row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    kind: tl.constexpr = left_ptr.dtype.element_ty if GRADIENT_IS_LEFT else right_ptr.dtype.element_ty
    row = row_tile.to(INDEX) * ROWS + tl.arange(0, ROWS)
    column = column_tile.to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = (row < rows)[:, None], (column < columns)[None, :]
    low = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, summed, SUMMED):
        inner = start + tl.arange(0, SUMMED).to(INDEX)
        lefts = row[:, None] * left_stride_row + inner[None, :] * left_stride_summed
        rights = inner[:, None] * right_stride_summed + column[None, :] * right_stride_column
        left = tl.load(left_ptr + lefts, is_row & (inner < summed)[None, :], other=0.0).to(tl.float32)
        right = tl.load(right_ptr + rights, (inner < summed)[:, None] & is_column, other=0.0).to(tl.float32)
        low = product(rounded(left, kind), rounded(right, kind), low, PRECISION, WIDEN)

    low *= grad_factor
    tl.store(squares_ptr + row_tile * tl.cdiv(columns, COLUMNS) + column_tile, tl.sum(low * low))  # 0 beyond the edges
    places, inside = row[:, None] * columns + column[None, :], is_row & is_column
    if KEEP_LOW:
        tl.store(low_ptr + places, low, inside)
    if MOMENTS == "codes":  # the tile is whole blocks, one after the other
        low = low.reshape(ROWS * COLUMNS // BLOCK, BLOCK)
        if COLUMNS == BLOCK:
            starts = row * columns + column_tile * BLOCK
        else:
            starts = row_tile.to(INDEX) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS // BLOCK) * BLOCK
        blocks, is_block = starts // BLOCK, starts < rows * columns
        places = starts[:, None] + tl.arange(0, BLOCK)[None, :]
        inside = places < rows * columns

        largest = tl.load(first_largest_ptr + blocks, is_block, other=0.0)
        first = decoded(tl.load(first_ptr + places, inside, other=0), largest, signed_book_ptr)
        first = first + new1 * (low - first)
        # beyond the end is code 0, which in the signed book is no zero
        codes, largest = encoded(tl.where(inside, first, 0.0), signed_nearest_ptr, signed_upper_ptr, False)
        tl.store(first_ptr + places, codes.to(tl.uint8), inside)
        tl.store(first_largest_ptr + blocks, largest, is_block)

        largest = tl.load(second_largest_ptr + blocks, is_block, other=0.0)
        second = decoded(tl.load(second_ptr + places, inside, other=0), largest, book_ptr)
        second = second * beta2 + new2 * low * low
        codes, largest = encoded(second, nearest_ptr, upper_ptr, KEEP_NONZERO)
        tl.store(second_ptr + places, codes.to(tl.uint8), inside)
        tl.store(second_largest_ptr + blocks, largest, is_block)
        tl.store(direction_ptr + places, tl.div_rn(first, tl.sqrt_rn(second) + eps), inside)
    elif MOMENTS == "tensors":
        first = tl.load(first_ptr + places, inside, other=0.0).to(tl.float32)
        first = first + new1 * (low - first)
        tl.store(first_ptr + places, rounded(first, first_ptr.dtype.element_ty), inside)
        second = tl.load(second_ptr + places, inside, other=0.0).to(tl.float32)
        second = second * beta2 + new2 * low * low
        tl.store(second_ptr + places, rounded(second, second_ptr.dtype.element_ty), inside)


def tile(rows: int, columns: int, block: int | None, narrow: bool) -> tuple[int, int] | None:
    """ROWS and COLUMNS of a tile; where moments are in codes it must be whole blocks, None where it cannot be."""
    numbers = 4096 if not narrow else 16384 if block is None else 8192  # decoding needs registers of its own
    across = min(max(16, triton.next_power_of_2(columns)), 256 if narrow else 128)
    if block is not None:
        in_rows, in_tiles = columns % block == 0, columns == across and numbers % block == 0
        if in_rows:
            across = block
        elif not in_tiles:
            return None
    down = numbers // across
    return (down, across) if down >= 16 else None


def tiles(by: tuple[int, int], block: int | None) -> list[Tiles]:
    """What to choose from, with SUMMED numbers at a time added up: the tile, and half of it with half the warps."""
    first, (down, across) = Tiles((*by, 32), 8, 3), by
    half = Tiles((down // 2, across, 32), 4, 3)
    fits = down >= 32 and (block is None or across == block or down // 2 * across % block == 0)
    return [
        first,
        first._replace(stages=2),
        first._replace(stages=4),
        *([half, half._replace(stages=4)] if fits else []),
    ]


def projected_adam(
    grad: Tensor,
    basis: Tensor,
    first: Moment,
    second: Moment,
    *,
    side: Literal["left", "right"],
    betas: tuple[float, float],
    eps: float,
    grad_factor: float,
    block: int,
    keep_nonzero: bool,
    keep_low: bool,
) -> Projected:
    left, right = (grad, basis) if side == "right" else (basis.T, grad)
    rows, columns, coded = left.shape[0], right.shape[1], isinstance(first, tuple)
    narrow = grad.dtype is not torch.float32
    by, moments = tile(rows, columns, block if coded else None, narrow), "codes" if coded else "tensors"
    if by is None:  # blocks lie across tiles
        by, moments, keep_low = tile(rows, columns, None, narrow), "none", True
    assert by is not None
    parts = [moment if isinstance(moment, tuple) else (moment, moment) for moment in (first, second)]
    assert all(part.is_contiguous() for moment in parts for part in moment)
    direction = torch.empty(rows, columns, device=grad.device) if coded else parts[0][0]
    low = torch.empty(rows, columns, device=grad.device) if keep_low else None
    tables = [
        table
        for signed in (True, False)
        for table in (code_book(signed, grad.device), *nearest_codes(signed, grad.device))
    ]

    def run(by: Tiles, into: Sequence[Tensor]) -> Tensor:
        grid = triton.cdiv(rows, by.sizes[0]), triton.cdiv(columns, by.sizes[1])
        squares = torch.empty(grid, device=grad.device)
        projected_adam_kernel[grid[::-1] if side == "right" else grid](
            left,
            right,
            *into,
            direction,
            direction if low is None else low,
            squares,
            *tables,
            rows,
            columns,
            left.shape[1],
            *left.stride(),
            *right.stride(),
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            grad_factor,
            side == "right",
            moments,
            keep_nonzero,
            keep_low,
            block,
            index_type(left, right),
            precision(),
            INTERPRETED,
            *by.sizes,
            num_warps=by.warps,
            num_stages=by.stages,
        )
        return squares

    candidates = tiles(by, block if moments == "codes" else None)
    bucket = f"{grad.dtype} {basis.dtype} {parts[0][0].dtype} {side} {moments} {keep_low} {block} {by}"
    sizes = "x".join(str(rounded_up(size)) for size in (rows, columns, left.shape[1]))
    changed = [parts[0][0], parts[1][0], parts[0][1], parts[1][1]]
    with torch.cuda.device_of(grad):
        squares = run(chosen("projected_adam", f"{bucket} {sizes}", candidates, grad.device, changed, run), changed)
    norm = squares.sum().sqrt()
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return Projected(AdamDirection(first, second, eps), low, norm)
    if moments == "none" and isinstance(first, tuple) and isinstance(second, tuple) and low is not None:
        adam_8bit_step(
            direction.zero_(),
            low,
            first,
            second,
            step_size=-1.0,
            betas=betas,
            eps=eps,
            decay=0.0,
            decay_first=True,
            block=block,
            keep_nonzero=keep_nonzero,
            seed=None,
        )
    return Projected(direction, low, norm)
