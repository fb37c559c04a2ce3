"""A matrix brought near its orthonormal factor by Newton-Schulz iteration, as Muon and Trion use it; Trion's rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Dense, Direction, wide
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Muon's: steep at 0, so five steps bring singular values to about [0.7, 1.2]
EPS = 1e-7  # against division by the norm of a matrix of zeros


def newton_schulz(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of matrix = U S V^T (M, N), nearly: all singular values brought to about 0.7 to 1.2; in its own dtype.

    X = matrix / ||matrix||_F, then `steps` times: A = X X^T; X <- a X + (b A + c A^2) X  (Jordan et al., 2024; the
    coefficients are Muon's). A tall matrix is transposed meanwhile, so that A has the short side. `dtype` is the one
    computed in, by default the matrix's.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(dtype or matrix.dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


@dataclass
class Orthogonalized(Transform):
    """direction = adjust * NS(g), without a state: Trion's rule on its small momentum (arXiv 2505.17967).

    The momentum is kept outside, by the feedback with `retained`. adjust follows the shape (M, N) of the whole matrix,
    not of the small one: `dion` sqrt(M / N), `original` sqrt(max(1, M / N)), `match_rms_adamw` 0.2 sqrt(max(M, N)),
    `none` 1.
    """

    steps: int = 5
    adjust_lr: Literal["dion", "original", "match_rms_adamw", "none"] = "original"
    precision: Literal["bfloat16", "wide"] = "bfloat16"  # of the iteration; wide: float32, or as the weights if wider
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Orthogonalized's steps is {self.steps}; it must be at least 1")

    def init(self, param: Tensor, slot: Slot) -> State:
        fault = self.misfit(param.shape)
        if fault is not None:
            raise ValueError(f"{slot.name} of shape {tuple(param.shape)}: {fault}")
        return {}

    def misfit(self, shape: Size | tuple[int, ...]) -> str | None:
        """As Muon's: what has no rows and columns has no singular values."""
        return None if len(shape) == 2 else "Orthogonalized works on matrices alone; choose another inner rule"

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        return Dense(newton_schulz(wide(compressed), self.steps, dtype), factor=self.adjustment(param.shape))

    def adjustment(self, shape: Size | tuple[int, ...]) -> float:
        """What the update of a (M, N) matrix is multiplied by."""
        rows, columns = shape
        if self.adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        ratio = {"dion": rows / columns, "original": max(1.0, rows / columns), "none": 1.0}
        return math.sqrt(ratio[self.adjust_lr])

    def rotate(self, state: State, change: Change) -> None:
        """There is nothing to carry over."""
