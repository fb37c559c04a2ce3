"""Adding an update to weights that are kept as 8-bit affine codes, the new codes rounded at random."""

from __future__ import annotations

import functools

from torch import Tensor

from lowrank_train.kernels.affine import Affine, dequantize_affine_reference, quantize_affine_reference
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.philox import random_16_bits


def int8_update_(
    weight: Affine,
    update: Tensor,
    *,
    factor: float = 1.0,
    decay: float = 0.0,
    decay_first: bool = True,
    group: int = 256,
    seed: int | None = None,
    published: bool = False,
) -> None:
    """W <- (1 - decay) W + factor * update, in place, with a new scale and zero for each group.

    Q-GaLore's step on int8 weights (arXiv 2407.08296, section 3.4). weight: 8-bit codes of W, in groups along the
    flattened tensor; update: float32 or narrower, of the shape of W. The decay comes before or after. Nothing of the
    size of W is made.
    seed: rounds at random, by the uniform numbers (random_16_bits + 1/2) / 2^16 of the flattened tensor, so that what
        is below a code's step is kept on average; None: to the nearest, which loses updates below half a step.
    published: the ranges of groups as in the published code, see quantize_affine.
    """
    assert weight.codes.is_contiguous() and weight.codes.numel() == update.numel()
    add = functools.partial(int8_update_reference_, published=published)
    if is_tile(group) and not published and runs_kernel(update, weight.codes, weight.scale, weight.zero):
        from lowrank_train.kernels.triton import int8_update

        add = int8_update.int8_update_  # type: ignore[assignment]
    add(weight, update, factor=factor, decay=decay, decay_first=decay_first, group=group, seed=seed)


def int8_update_reference_(
    weight: Affine,
    update: Tensor,
    *,
    factor: float,
    decay: float,
    decay_first: bool,
    group: int,
    seed: int | None,
    published: bool = False,
) -> None:
    """`int8_update_` in plain torch, with all of W decoded."""
    dense, change = dequantize_affine_reference(weight, update.shape, bits=8, group=group), update.float() * factor
    kept = 1 - decay
    dense = dense.mul_(kept).add_(change) if decay_first else dense.add_(change).mul_(kept)
    uniform = None
    if seed is not None:
        bits = random_16_bits(seed, 1, dense.numel(), dense.device).view(dense.shape)
        uniform = bits.float().add_(0.5).div_(2**16)
    made = quantize_affine_reference(dense, bits=8, group=group, uniform=uniform, published=published)
    for name, value in vars(made).items():
        stored: Tensor = getattr(weight, name)
        stored.copy_(value)
