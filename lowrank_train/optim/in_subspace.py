"""The composition at the heart of the project: an inner rule run on the gradient's small copy, lifted back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.lift import Lift
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Direction, Slot, State, Transform, counter


@dataclass
class InSubspace(Transform):
    """low = down(G); u = inner(low); direction = lift(u). Itself a Transform.

    on_refresh says what becomes of the inner rule's state when the basis moves: `keep` it as it is (GaLore), or
    `reset` it to its beginning (FRUGAL). The state of the three parts lies in one flat dictionary.
    """

    subspace: Subspace
    inner: Transform
    lift: Lift
    on_refresh: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        self.compresses = True
        self.needs_gradient = self.lift.needs_gradient
        self.weight_decay_first = self.inner.weight_decay_first

    def init(self, param: Tensor, slot: Slot) -> State:
        low = torch.empty(self.subspace.low_shape(param.shape), dtype=param.dtype, device=param.device)
        parts = (self.subspace.init(param, slot), self.inner.init(low, slot), {"updates_done": 0})
        state = {key: value for part in parts for key, value in part.items()}
        assert len(state) == sum(len(part) for part in parts), (
            f"two parts use one state key: {[sorted(part) for part in parts]}"
        )
        return state

    def refresh_due(self, state: State) -> bool:
        return counter(state, "updates_done") >= counter(state, "refresh_at")

    def refresh_counts(self, state: State) -> tuple[int, int]:
        return counter(state, "refreshes"), counter(state, "fallbacks")

    def compress(self, grad: Tensor, state: State) -> Tensor:
        if self.refresh_due(state):
            moved = self.subspace.refresh(grad, state)
            self.subspace.schedule_next(state, counter(state, "updates_done"), moved)
            if moved and self.on_refresh == "reset":
                self._reset_inner(grad, state)
        return self.subspace.down(grad, state)

    def update(self, compressed: Tensor, state: State, param: Tensor, grad: Tensor | None = None) -> Direction:
        low_update = self.inner.update(compressed, state, param).tensor()
        state["updates_done"] = counter(state, "updates_done") + 1
        return self.lift.lift(low_update, compressed, grad, self.subspace, state, param.shape)

    def _reset_inner(self, grad: Tensor, state: State) -> None:
        low = torch.empty(self.subspace.low_shape(grad.shape), dtype=grad.dtype, device=grad.device)
        for key, fresh in self.inner.init(low, Slot("", 0, 0.0, grad.dtype)).items():
            value = state[key]
            if isinstance(value, Tensor):
                assert isinstance(fresh, Tensor)
                value.copy_(fresh)
            else:
                state[key] = fresh
