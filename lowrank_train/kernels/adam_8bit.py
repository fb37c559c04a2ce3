"""One step of Adam whose moments are 8-bit codes, decoded and encoded around the update."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_train.kernels.blockwise import dequantize_blockwise_reference, quantize_blockwise_reference
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.philox import rounded_at_random


def adam_8bit_step(
    param: Tensor,
    grad: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    *,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
    decay: float = 0.0,
    decay_first: bool = True,
    block: int = 256,
    keep_nonzero: bool = True,
    seed: int | None = None,
) -> None:
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; W <- W - step_size * m / (sqrt(v) + eps); all in place.

    8-bit Adam (arXiv 2110.02861): the weights move by the moments before these are encoded again. The arithmetic is
    float32, and the weights are rounded once at the end, with the decay in them.
    param, grad: of one shape, float32 or narrower, param contiguous.
    first, second: codes, uint8 of that shape, and the largest magnitudes of their blocks, (blocks,) float32, of m in
        the signed code book and of v in the unsigned one.
    step_size, eps: after bias correction, c = 1 - b^t: lr sqrt(c2)/c1 and eps where eps is added to sqrt(v), and
        lr sqrt(c2)/c1 and eps sqrt(c2) where it is added to sqrt(v/c2), as in torch.
    decay: W <- (1 - decay) W, before the update or after it (decay_first).
    keep_nonzero: a v too small for the code book becomes its least number instead of 0.
    seed: rounds bfloat16 weights at random, by rounded_at_random of the flattened tensor; None: to the nearest.
    """
    assert param.is_contiguous() and param.shape == grad.shape
    step = adam_8bit_step_reference
    if is_tile(block) and runs_kernel(param, grad, *first, *second):
        from lowrank_train.kernels.triton import adam_8bit

        step = adam_8bit.adam_8bit_step
    step(
        param,
        grad,
        first,
        second,
        step_size=step_size,
        betas=betas,
        eps=eps,
        decay=decay,
        decay_first=decay_first,
        block=block,
        keep_nonzero=keep_nonzero,
        seed=seed,
    )


def adam_8bit_step_reference(
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
    gradient = grad.float()
    exp_avg = dequantize_blockwise_reference(*first, signed=True, block=block).lerp_(gradient, 1 - betas[0])
    exp_avg_sq = dequantize_blockwise_reference(*second, signed=False, block=block)
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    weight = param.float()
    if decay and decay_first:
        weight = weight * (1 - decay)
    weight = weight.addcdiv(exp_avg, exp_avg_sq.sqrt().add_(eps), value=-step_size)
    if decay and not decay_first:
        weight.mul_(1 - decay)
    if seed is not None and param.dtype is torch.bfloat16:
        weight = rounded_at_random(weight.view(-1), seed).view(param.shape)
    param.copy_(weight)
    for stored, moment, signed in ((first, exp_avg, True), (second, exp_avg_sq, False)):
        keep = keep_nonzero and not signed
        codes, largest = quantize_blockwise_reference(moment, signed=signed, block=block, keep_nonzero=keep)
        stored[0].copy_(codes)
        stored[1].copy_(largest)
