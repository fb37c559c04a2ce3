"""The last part of a projected step: back-projection, what the subspace left out, decay and rounding in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.kernels.affine import Affine
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.int8_update import int8_update_reference_
from lowrank_train.kernels.philox import rounded_at_random


@dataclass(frozen=True)
class AdamDirection:
    """exp_avg / (sqrt(exp_avg_sq) + eps), made where it is used instead of stored."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    eps: float


@dataclass(frozen=True)
class Residual:
    """What is added beside the back-projection: factor * line * G, or factor * sign(G - up(low)).

    The first is Fira's (arXiv 2410.01623), whose line factors phi are one a row (M, 1) or column (1, N), or one for
    all (1, 1), and APOLLO's, the second FRUGAL's (arXiv 2411.07837), whose `low` is the compressed gradient.
    """

    grad: Tensor  # (M, N)
    factor: float
    line: Tensor | None = None
    low: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.line is None) != (self.low is None), "line factors, or the sign of what the subspace left out"


def lifted_update_(
    param: Tensor | Affine,
    small: Tensor | AdamDirection,
    basis: Tensor,
    *,
    side: Literal["left", "right"],
    factor: float,
    residual: Residual | None = None,
    decay: float = 0.0,
    decay_first: bool = True,
    group: int = 256,
    seed: int | None = None,
) -> None:
    """W <- (1 - decay) W + factor * up(small) + residual, in place and rounded once; the decay before or after.

    up(S) = S B^T with side=right, S (M, R) and B (N, R), and B S with side=left, S (R, N) and B (M, R): GaLore's step
    (arXiv 2403.03507, algorithm 2) with factor = -lr * scale * bias correction. Factors of products are rounded to the
    dtype of W (M, N), which is float32 or narrower and contiguous; sums are float32.
    param: W, or 8-bit codes of it in groups of `group`, encoded anew as by int8_update_; products then are in the dtype
        of the basis.
    seed: rounds bfloat16 weights at random, by rounded_at_random of the matrix, and codes as int8_update_ does; None:
        to the nearest.
    """
    stored = list(vars(param).values()) if isinstance(param, Affine) else [param]
    assert all(part.is_contiguous() for part in stored) and basis.ndim == 2
    operands = [small] if isinstance(small, Tensor) else [small.exp_avg, small.exp_avg_sq]
    others = [] if residual is None else [residual.grad, residual.line, residual.low]
    update = lifted_update_reference_
    if (is_tile(group) or isinstance(param, Tensor)) and runs_kernel(*stored, basis, *operands, *others):
        from lowrank_train.kernels.triton import lifted_update

        update = lifted_update.lifted_update_
    update(
        param,
        small,
        basis,
        side=side,
        factor=factor,
        residual=residual,
        decay=decay,
        decay_first=decay_first,
        group=group,
        seed=seed,
    )


def lifted_update_reference_(
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
    """`lifted_update_` in plain torch."""
    dtype = param.dtype if isinstance(param, Tensor) else basis.dtype
    change = _change(small, basis, side, factor, residual, dtype)
    if isinstance(param, Affine):
        int8_update_reference_(param, change, factor=1.0, decay=decay, decay_first=decay_first, group=group, seed=seed)
        return
    weight = param.to(change.dtype)
    if decay and decay_first:
        weight = weight * (1 - decay)
    weight = weight + change
    if decay and not decay_first:
        weight.mul_(1 - decay)
    param.copy_(rounded_at_random(weight, seed) if seed is not None and dtype is torch.bfloat16 else weight)


def _change(
    small: Tensor | AdamDirection,
    basis: Tensor,
    side: str,
    factor: float,
    residual: Residual | None,
    dtype: torch.dtype,
) -> Tensor:
    """factor * up(small) + residual, (M, N), at least float32; factors of products in `dtype`."""
    work = torch.promote_types(dtype, torch.float32)

    def up(low: Tensor) -> Tensor:
        left, right = (low, basis.T) if side == "right" else (basis, low)
        return left.to(dtype).to(work) @ right.to(dtype).to(work)

    if isinstance(small, AdamDirection):
        small = small.exp_avg.to(work) / small.exp_avg_sq.to(work).sqrt().add_(small.eps)
    change = up(small).mul_(factor)
    if residual is not None:
        grad = residual.grad.to(work)
        if residual.low is not None:
            change.add_((grad - up(residual.low)).sign_(), alpha=residual.factor)
        else:
            assert residual.line is not None
            change.addcmul_(grad, residual.line.to(work), value=residual.factor)
    return change
