"""Numbers written into bfloat16 weights: to the nearest, at random with the right mean, or with the rest kept."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lowrank_train.kernels.philox import rounded_at_random
from lowrank_train.kernels.pieces import pieces

Rounding = Literal["nearest", "stochastic", "compensated"]
"""nearest: plain rounding, which loses updates below half a unit in the last place. stochastic: rounded up or down with
the probability that makes the mean right. compensated: a second tensor keeps what rounding left over."""


def write_rounded_(weight: Tensor, values: Tensor, residue: Tensor | None = None, *, seed: int | None = None) -> None:
    """weight <- values, rounded; residue <- values - weight, rounded to the nearest in its turn.

    values: of weight's shape, float32 or wider.
    residue: bfloat16 as the weights, which then are right to 2^-16 of their size: 2^-8 of 2^-8. None: what is left
        over is lost.
    seed: rounds at random, by rounded_at_random of one piece after the other, of which number i, counted from 0, draws
        from seed ^ i. None: to the nearest.
    """
    residues = [] if residue is None else [residue]
    for number, (into, exact, *left) in enumerate(pieces(weight, values, *residues)):
        into.copy_(exact if seed is None else rounded_at_random(exact.float(), seed ^ number))
        for rest in left:
            rest.copy_(exact - into)
