"""The basis moved along a geodesic of the Grassmannian towards the gradient: SubTrack++'s subspace tracking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank_train.optim.direction import wide
from lowrank_train.optim.subspace.base import largest_entry, require_one_side
from lowrank_train.optim.subspace.randomized import orthonormalize
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import State, counter, tensor_of


@dataclass
class Geodesic(Svd):
    """B <- B + (B v (cos(a) - 1) - u sin(a)) v^T, a = step_size * s (SubTrack++, arXiv 2502.01586).

    s u v^T is the leading term of the slope dF = -2 (X - B B^T X) X^T B of ||B B^T X - X||^2 over subspaces, X the
    gradient (left side; right: its transpose). The step turns one direction of B by the angle a and leaves R - 1 as
    they are; B stays orthonormal, however long the step. The first basis is the exact decomposition.

    The angle grows with the square of the gradient, which is what `step_size` is set against: the paper has 10, its
    code 10000. The published code forms the slope for tall and square matrices from a product that is zero, so that
    there the basis never moves; here both sides follow the formula.
    """

    step_size: float = 10.0
    signs: Literal["aligned", "raw"] = "raw"  # a geodesic turns no vector round

    codable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_side(self)
        if not 0 <= self.step_size < math.inf:
            raise ValueError(f"strategy.subspace.step_size is {self.step_size}; it must be a finite number from 0 on")

    def move(self, grad: Tensor, state: State) -> bool:
        if counter(state, "refreshes") == 0:
            return super().move(grad, state)
        matrix = wide(grad.detach())
        largest = largest_entry(matrix)
        if largest == 0:
            return False
        (key,) = self._keys(state)
        source = (matrix.T if key == "basis_right" else matrix) / largest  # X (dimension, other side)
        stored = tensor_of(state, key)
        basis = orthonormalize(wide(stored).to(source.dtype))  # what is stored may be rounded to bfloat16
        low = basis.T @ source
        slope = 2 * (basis @ (low @ low.T) - source @ low.T)
        slope -= basis @ (basis.T @ slope)  # zero but for rounding
        left, sizes, right = torch.linalg.svd(slope, full_matrices=False)
        angle = self.step_size * sizes[0].double() * largest.double().square()  # float32 holds no 1e30 squared
        angle = angle.clamp_max(torch.finfo(torch.float64).max)
        u, v = left[:, 0], right[0]
        turned = basis @ v * (angle.cos() - 1).to(v.dtype) - u * angle.sin().to(v.dtype)
        stored.copy_(basis + torch.outer(turned, v))
        return True
