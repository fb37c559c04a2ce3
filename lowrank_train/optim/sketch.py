"""A lift that comes before the rule: gradients accumulated in a subspace, and whole again for the update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowrank_train.optim.direction import Direction
from lowrank_train.optim.lift import Lift
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import State


@dataclass
class LiftFirst(Lift):
    """S = sum of down(G_i) over the micro-batches; direction = rule(up(S)) (Flora, arXiv 2402.03293, algorithm 1).

    The accumulated gradient takes the subspace's memory instead of the matrix's; the rule's state is that of the whole
    matrix, and so is a temporary, up(S), while the matrix is updated. With a Gaussian subspace E[up(S)] = sum of G_i.
    """

    def __post_init__(self) -> None:
        self.comes_first = True

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        """The rule has made a direction of the whole matrix already."""
        return low_update
