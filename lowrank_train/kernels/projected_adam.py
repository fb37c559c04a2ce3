"""The first part of a projected step: the small gradient and Adam's moments of it, in one pass over the gradient."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step_reference
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.lifted_update import AdamDirection

Moment = Tensor | tuple[Tensor, Tensor]
"""A moment as it is stored: a tensor, or 8-bit codes and the largest magnitudes of their blocks."""


class Projected(NamedTuple):
    """What a projection with Adam's step leaves for the second half of an update."""

    direction: Tensor | AdamDirection
    low: Tensor | None  # R in float32, where it is kept
    norm: Tensor  # of R, 0-dimensional


def projected_adam(
    grad: Tensor,
    basis: Tensor,
    first: Moment,
    second: Moment,
    *,
    side: Literal["left", "right"],
    betas: tuple[float, float],
    eps: float,
    grad_factor: float = 1.0,
    block: int = 256,
    keep_nonzero: bool = True,
    keep_low: bool = False,
) -> Projected:
    """R = f down(G); m <- b1 m + (1 - b1) R; v <- b2 v + (1 - b2) R^2, in place; the direction is m / (sqrt(v) + eps).

    down(G) = G B with side=right, G (M, N) and B (N, R), and B^T G with side=left, B (M, R): GaLore (arXiv 2403.03507,
    algorithm 2). Factors of the product are rounded to the dtype of G, which is float32 or narrower; sums are float32.
    Moments are of the shape of R, both stored alike, the first in the signed code book, the second in the unsigned one
    (block and keep_nonzero as in adam_8bit_step). The direction of what is stored in codes is that of the moments
    before they are rounded, a float32 tensor; that of tensors is left to be made where it is used. eps is added to
    sqrt(v): with bias correction as in adam_8bit_step.
    grad_factor: f, such as that of a clipped norm.
    keep_low: returns R too, which some lifts need.
    """
    project = projected_adam_reference
    tensors = [part for moment in (first, second) for part in (moment if isinstance(moment, tuple) else (moment,))]
    if is_tile(block) and runs_kernel(grad, basis, *tensors):
        from lowrank_train.kernels.triton import projected_adam

        project = projected_adam.projected_adam
    return project(
        grad,
        basis,
        first,
        second,
        side=side,
        betas=betas,
        eps=eps,
        grad_factor=grad_factor,
        block=block,
        keep_nonzero=keep_nonzero,
        keep_low=keep_low,
    )


def projected_adam_reference(
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
    """`projected_adam` in plain torch."""
    work = torch.promote_types(grad.dtype, torch.float32)
    wide, turned = grad.to(work), basis.to(grad.dtype).to(work)
    low = wide @ turned if side == "right" else turned.T @ wide
    low *= grad_factor
    kept, norm = low if keep_low else None, torch.linalg.vector_norm(low)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        exp_avg = first.to(work).lerp_(low, 1 - betas[0])
        exp_avg_sq = second.to(work).mul_(betas[1]).addcmul_(low, low, value=1 - betas[1])
        first.copy_(exp_avg)
        second.copy_(exp_avg_sq)
        return Projected(AdamDirection(first, second, eps), kept, norm)
    assert isinstance(first, tuple) and isinstance(second, tuple), "both moments are stored alike"
    direction = torch.zeros_like(low)
    adam_8bit_step_reference(
        direction,
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
    return Projected(direction, kept, norm)
