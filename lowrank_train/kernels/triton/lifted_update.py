"""Back-projection, residual, decay and rounding in one pass over the weights: see kernels/lifted_update.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_train.kernels.affine import Affine
from lowrank_train.kernels.lifted_update import AdamDirection, Residual
from lowrank_train.kernels.triton.affine import encoded
from lowrank_train.kernels.triton.int8_update import int8_update_
from lowrank_train.kernels.triton.products import INTERPRETED, index_type, precision, product
from lowrank_train.kernels.triton.rounding import noise_of, random_bfloat16, rounded
from lowrank_train.kernels.triton.tuning import Tiles, chosen, rounded_up


@triton.jit
def lifted_update_kernel(
    param_ptr: tl.tensor,  # or codes
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    left_ptr: tl.tensor,  # (rows, rank); the numerator where it is the small one and made of moments
    right_ptr: tl.tensor,  # (rank, columns); likewise
    square_ptr: tl.tensor,
    low_ptr: tl.tensor,  # in place of the small one, in the product that is subtracted from the gradient
    grad_ptr: tl.tensor,
    line_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    left_stride_row: tl.tensor,
    left_stride_rank: tl.tensor,
    right_stride_rank: tl.tensor,
    right_stride_column: tl.tensor,
    line_stride_row: tl.tensor,
    line_stride_column: tl.tensor,
    eps: tl.float32,
    factor: tl.float32,
    residual_factor: tl.float32,
    kept: tl.float32,  # 1 - decay
    seed: tl.int64,
    CODED: tl.constexpr,  # the weights are codes, whose groups are the rows of tiles
    SMALL_IS_LEFT: tl.constexpr,
    OF_MOMENTS: tl.constexpr,
    RESIDUAL: tl.constexpr,  # "none", "line" or "sign"
    DECAY_FIRST: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    INDEX: tl.constexpr,
    kind: tl.constexpr,  # in which dtype factors of products are
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    row_tile, column_tile = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8)
    row = row_tile.to(INDEX) * ROWS + tl.arange(0, ROWS)
    column = column_tile.to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = (row < rows)[:, None], (column < columns)[None, :]
    inside_subspace = tl.zeros((ROWS, COLUMNS), tl.float32)
    back = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        inner = start + tl.arange(0, RANK).to(INDEX)
        lefts = row[:, None] * left_stride_row + inner[None, :] * left_stride_rank
        rights = inner[:, None] * right_stride_rank + column[None, :] * right_stride_column
        in_left, in_right = is_row & (inner < rank)[None, :], (inner < rank)[:, None] & is_column
        left = tl.load(left_ptr + lefts, in_left, other=0.0).to(tl.float32)
        right = tl.load(right_ptr + rights, in_right, other=0.0).to(tl.float32)
        if SMALL_IS_LEFT:
            if OF_MOMENTS:
                square = tl.load(square_ptr + lefts, in_left, other=0.0).to(tl.float32)
                left = tl.div_rn(left, tl.sqrt_rn(square) + eps)
            if RESIDUAL == "sign":
                low = tl.load(low_ptr + lefts, in_left, other=0.0).to(tl.float32)
                back = product(rounded(low, kind), rounded(right, kind), back, PRECISION, WIDEN)
        else:
            if OF_MOMENTS:
                square = tl.load(square_ptr + rights, in_right, other=0.0).to(tl.float32)
                right = tl.div_rn(right, tl.sqrt_rn(square) + eps)
            if RESIDUAL == "sign":
                low = tl.load(low_ptr + rights, in_right, other=0.0).to(tl.float32)
                back = product(rounded(left, kind), rounded(low, kind), back, PRECISION, WIDEN)
        inside_subspace = product(rounded(left, kind), rounded(right, kind), inside_subspace, PRECISION, WIDEN)
    change = factor * inside_subspace
    places, inside = row[:, None] * columns + column[None, :], is_row & is_column
    if RESIDUAL != "none":
        grad = tl.load(grad_ptr + places, inside, other=0.0).to(tl.float32)
        if RESIDUAL == "sign":
            outside = grad - back
            change += residual_factor * ((outside > 0).to(tl.float32) - (outside < 0).to(tl.float32))
        else:
            lines = row[:, None] * line_stride_row + column[None, :] * line_stride_column
            change += residual_factor * grad * tl.load(line_ptr + lines, inside, other=0.0).to(tl.float32)
    param = tl.load(param_ptr + places, inside, other=0).to(tl.float32)
    groups = (row * columns) // COLUMNS + column_tile
    if CODED:
        zero = tl.load(zero_ptr + groups, row < rows, other=0).to(tl.float32)
        scale = tl.load(scale_ptr + groups, row < rows, other=0.0)
        param = (param - zero[:, None]) * scale[:, None]
    if DECAY_FIRST:
        param = param * kept + change
    else:
        param = (param + change) * kept
    octets = tl.arange(0, COLUMNS // 8)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    if CODED:
        drawn = param
        if AT_RANDOM:
            octets = octets + groups.to(tl.int64)[:, None] * (COLUMNS // 8)
            noise = noise_of(seed, octets, tl.zeros_like(octets)).reshape(ROWS, COLUMNS)
            drawn = (noise.to(tl.float32) + 0.5) / 65536.0
        codes, scale, zero = encoded(param, drawn, 8, AT_RANDOM)
        tl.store(param_ptr + places, codes.to(tl.uint8), inside)
        tl.store(scale_ptr + groups, scale, row < rows)
        tl.store(zero_ptr + groups, zero.to(tl.uint8), row < rows)
    elif AT_RANDOM:
        noise = noise_of(seed, octets + column_tile * (COLUMNS // 8), row[:, None])
        tl.store(param_ptr + places, random_bfloat16(param, noise.reshape(ROWS, COLUMNS)), inside)
    else:
        tl.store(param_ptr + places, rounded(param, param_ptr.dtype.element_ty), inside)


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def lifted_update_(
    param: Tensor | Affine,
    small: Tensor | AdamDirection,
    basis: Tensor,
    *,
    side: Literal["left", "right"],
    factor: float,
    residual: Residual | None,
    decay: float,
    decay_first: bool,
    group: int,
    seed: int | None,
) -> None:
    like = small if isinstance(small, Tensor) else small.exp_avg
    rows, columns = (like.shape[0], basis.shape[0]) if side == "right" else (basis.shape[0], like.shape[1])
    shape, lifted = (rows, columns), (small, basis, side, factor, residual)
    if isinstance(param, Tensor):
        _launch(param, None, shape, param.dtype, *lifted, decay, decay_first, group, seed)
    elif columns % group == 0 and group <= 256:
        _launch(param.codes, param, shape, basis.dtype, *lifted, decay, decay_first, group, seed)
    else:  # a group is no row of a tile
        change = torch.zeros(rows, columns, device=basis.device)
        _launch(change, None, shape, basis.dtype, *lifted, 0.0, True, group, None)
        int8_update_(param, change, factor=1.0, decay=decay, decay_first=decay_first, group=group, seed=seed)


def tiles(narrow: bool, group: int | None, two_sums: bool) -> list[Tiles]:
    """ROWS, COLUMNS and RANK: as large as the registers allow, where the columns may be given.

    All of one list sum up over RANK numbers at a time. Beside the first, which suits data centre cards, there are
    smaller ones for cards with less shared memory and fewer registers in flight.
    """
    numbers, warps = (16384, 8) if narrow else (2048, 4)
    if narrow and (two_sums or group is not None):  # what is decoded takes registers of its own
        numbers //= 2
    columns = group or (128 if narrow else 64)
    first = Tiles((min(128, max(16, numbers // columns)), columns, 32), warps, 3)
    if not narrow or group is not None:
        return [first, first._replace(stages=2), first._replace(stages=4)]
    others = [Tiles((128, 64, 32), 4, 3), Tiles((64, 128, 32), 4, 3), Tiles((64, 64, 32), 4, 4)]
    return [first, first._replace(stages=2), *(one for one in others if one.sizes != first.sizes)]


def _launch(
    weight: Tensor,
    coded: Affine | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    small: Tensor | AdamDirection,
    basis: Tensor,
    side: str,
    factor: float,
    residual: Residual | None,
    decay: float,
    decay_first: bool,
    group: int,
    seed: int | None,
) -> None:
    numerator, square, eps = (small, small, 0.0) if isinstance(small, Tensor) else vars(small).values()
    left, right = (numerator, basis.T) if side == "right" else (basis, numerator)
    low = line = grad = numerator  # what is not there is not read
    kind, residual_factor = "none", 0.0
    if residual is not None:
        kind, residual_factor = ("line" if residual.low is None else "sign"), residual.factor
        grad = residual.grad.contiguous()
        low, line = (numerator if part is None else part for part in (residual.low, residual.line))
    assert numerator.stride() == square.stride() == low.stride(), "they are read by the same places"
    of_line = [0 if length == 1 else stride for length, stride in zip(line.shape, line.stride(), strict=True)]
    of_moments, at_random = square is not numerator, seed is not None and weight.dtype in (torch.bfloat16, torch.uint8)

    def run(by: Tiles, into: Sequence[Tensor]) -> None:
        lifted_update_kernel[(triton.cdiv(shape[0], by.sizes[0]), triton.cdiv(shape[1], by.sizes[1]))](
            *into,
            left,
            right,
            square,
            low,
            grad,
            line,
            *shape,
            basis.shape[1],
            *left.stride(),
            *right.stride(),
            *of_line,
            eps,
            factor,
            residual_factor,
            1 - decay,
            seed or 0,
            coded is not None,
            side == "right",
            of_moments,
            kind,
            decay_first,
            at_random,
            index_type(weight, left, right),
            DTYPES[dtype],
            precision(),
            INTERPRETED,
            *by.sizes,
            num_warps=by.warps,
            num_stages=by.stages,
        )

    changed = [weight, weight, weight] if coded is None else [weight, coded.scale, coded.zero]
    candidates = tiles(dtype is not torch.float32, group if coded is not None else None, kind == "sign")
    bucket = f"{dtype} {weight.dtype} {numerator.dtype} {side} {kind} {of_moments} {at_random} {len(candidates)}"
    sizes = "x".join(str(rounded_up(size)) for size in (*shape, basis.shape[1]))
    with torch.cuda.device_of(weight):
        run(chosen("lifted_update", f"{bucket} {sizes}", candidates, weight.device, changed, run), changed)
