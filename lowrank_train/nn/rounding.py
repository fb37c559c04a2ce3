"""Adding a small update to weights in bfloat16 without losing it: to the nearest, at random, or with the rest kept."""

from __future__ import annotations

from torch import Tensor

from lowrank_train.kernels.rounding import Rounding, write_rounded_
from lowrank_train.nn.reparam import Origin


def add_(
    weight: Tensor, update: Tensor, rounding: Rounding, residue: Tensor | None, origin: Origin, number: int
) -> None:
    """weight <- weight + update, in place; `update` is at least float32, and `residue` what `weight` lacks so far.

    The random bits of rounding=stochastic follow from (origin, number). A float32 or wider weight is just added to.
    """
    if weight.dtype.itemsize >= 4:
        weight.add_(update.to(weight.dtype))
        return
    total = weight.to(update.dtype) + update
    if residue is not None:
        total += residue.to(update.dtype)
    write_rounded_(
        weight, total, residue, seed=origin.seed_of(f"rounding {number}") if rounding == "stochastic" else None
    )
