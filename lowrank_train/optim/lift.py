"""How a small update returns to the full matrix: back-projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Size, Tensor

from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Direction, Product, State


class Lift(ABC):
    """From the direction in the subspace to the direction of the matrix."""

    needs_gradient: bool = False  # uses what the subspace left out, so the full gradient must be there

    @abstractmethod
    def lift(
        self,
        low_update: Tensor,
        low_grad: Tensor,
        grad: Tensor | None,  # (M, N), None unless needs_gradient
        subspace: Subspace,
        state: State,
        shape: Size,  # (M, N)
    ) -> Direction:
        """The direction of the full matrix, before -lr."""


@dataclass
class Backproject(Lift):
    """scale * up(low_update): GaLore's lift (arXiv 2403.03507, algorithm 1, where scale is alpha)."""

    scale: float = 0.25

    def lift(
        self, low_update: Tensor, low_grad: Tensor, grad: Tensor | None, subspace: Subspace, state: State, shape: Size
    ) -> Direction:
        left_MR, right_RN = subspace.up(low_update, state, shape)
        return Product(left_MR, right_RN, self.scale)
