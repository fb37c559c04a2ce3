"""Adding a small update to weights in bfloat16 without losing it: to the nearest, at random, or with the rest kept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lowrank_train.nn.reparam import Origin

Rounding = Literal["nearest", "stochastic", "compensated"]
"""nearest: plain rounding, which loses updates below half a unit in the last place. stochastic: rounded up or down with
the probability that makes the mean right. compensated: a second tensor keeps what rounding left over."""


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
    if rounding == "stochastic":
        weight.copy_(rounded_at_random(total, origin.generator(f"rounding {number}")))
        return
    weight.copy_(total)
    if residue is not None:
        residue.copy_(total - weight.to(total.dtype))


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up with a probability equal to the distance from the lower neighbour."""
    bits = values.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator, device="cpu")
    cut = (bits + noise.to(bits.device)) & -(1 << 16)  # of sign and magnitude: the carry may move up the exponent
    return cut.view(torch.float32).to(torch.bfloat16)
