"""Gradients accumulated in a subspace and brought back whole before the rule sees them: Flora's accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowrank_train.optim.direction import Direction
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter


@dataclass
class Sketched(Transform):
    """S = sum of down(G_i) over the micro-batches; direction = rule(up(S)) (arXiv 2402.03293, algorithm 1).

    The accumulated gradient takes the subspace's memory instead of the matrix's; the rule's state is that of the whole
    matrix. With a Gaussian subspace E[up(S)] = sum of G_i. The state of the two parts lies in one flat dictionary.
    """

    subspace: Subspace
    rule: Transform

    def __post_init__(self) -> None:
        self.compresses = True
        self.weight_decay_first = self.rule.weight_decay_first

    def init(self, param: Tensor, slot: Slot) -> State:
        sketch, whole = self.subspace.init(param, slot), self.rule.init(param, slot)
        # the seed is the parameter's in both; nothing else may be shared
        assert not (sketch.keys() & whole.keys()) - {"seed"}, f"two parts share a key: {sketch} {whole}"
        return sketch | whole | {"updates_done": 0}

    def refresh_due(self, state: State) -> bool:
        return counter(state, "updates_done") >= counter(state, "refresh_at")

    def refresh_counts(self, state: State) -> tuple[int, int]:
        return counter(state, "refreshes"), counter(state, "fallbacks")

    def compress(self, grad: Tensor, state: State) -> Tensor:
        if self.refresh_due(state):
            moved = self.subspace.refresh(grad, state)
            self.subspace.schedule_next(state, counter(state, "updates_done"), moved)
        return self.subspace.down(grad, state)

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        whole = self.subspace.up(compressed, state, param.shape).tensor()
        state["updates_done"] = counter(state, "updates_done") + 1
        return self.rule.update(whole, state, param, rates, whole)

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return self.rule.decay_scale(param)
