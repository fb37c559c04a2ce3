"""Columns to unit length, one launch a matrix: see kernels/unit_columns.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels.triton.products import index_type
from lowrank_train.kernels.triton.rounding import rounded

ROWS, COLUMNS, WARPS = 128, 16, 4  # narrow strips, so that some ten programs share the columns of one sample
SHORTEST = tl.constexpr(1e-12)  # of torch.nn.functional.normalize


@triton.jit
def unit_columns_kernel(
    matrix_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A strip of columns is read for its lengths, and read again, from the cache, to be divided."""
    column = tl.program_id(0).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(INDEX)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(matrix_ptr + row[:, None] * columns + column[None, :], inside, other=0.0).to(tl.float32)
        squares += tl.sum(values * values, 0)
    length = tl.maximum(tl.sqrt_rn(squares), SHORTEST)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS).to(INDEX)
        places, inside = row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(matrix_ptr + places, inside, other=0.0).to(tl.float32)
        unit = tl.div_rn(values, tl.broadcast_to(length[None, :], values.shape))
        tl.store(matrix_ptr + places, rounded(unit, matrix_ptr.dtype.element_ty), inside)


def unit_columns_(matrix: Tensor) -> None:
    with torch.cuda.device_of(matrix):
        unit_columns_kernel[(triton.cdiv(matrix.shape[1], COLUMNS),)](
            matrix, *matrix.shape, index_type(matrix), ROWS, COLUMNS, num_warps=WARPS
        )
