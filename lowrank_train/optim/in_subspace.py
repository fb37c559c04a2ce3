"""The composition at the heart of the project: an inner rule run on the gradient's small copy, lifted back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.contradictions import refuse_contradictions
from lowrank_train.optim.direction import Direction
from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.fused import FusedStep
from lowrank_train.optim.lift import Lift
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Move, Rates, Slot, State, Transform, counter, tensor_of


@dataclass
class InSubspace(Transform):
    """low = down(G); u = inner(low); direction = lift(u), or inner(lift(low)). Itself a Transform.

    on_refresh says what becomes of the inner rule's state when the basis moves: `keep` it as it is (GaLore), `reset` it
    to its beginning (FRUGAL), or `rotate` it into the new coordinates (LDAdam). The state of the three parts lies in
    one flat dictionary.
    """

    subspace: Subspace
    inner: Transform
    lift: Lift
    on_refresh: Literal["keep", "reset", "rotate"] = "keep"
    feedback: ErrorFeedback | None = None

    def __post_init__(self) -> None:
        refuse_contradictions(self.subspace, self.inner, self.lift, self.on_refresh, self.feedback)
        self.compresses = True
        self.accumulates = self.feedback is None
        self.needs_gradient = self.lift.needs_gradient
        self.weight_decay_first = self.inner.weight_decay_first
        self.fused = FusedStep.of(self.subspace, self.inner, self.lift, self.feedback)

    def init(self, param: Tensor, slot: Slot) -> State:
        basis = self.subspace.init(param, slot)
        parts = (
            basis,
            self._init_inner(param, slot, basis),
            self.lift.init(param, slot),
            self.feedback.init(param, slot) if self.feedback is not None else {},
            {"updates_done": 0},
        )
        state = {key: value for part in parts for key, value in part.items()}
        assert len(state) == sum(len(part) for part in parts), f"two parts share a key: {parts}"
        return state

    def misfit(self, shape: Size) -> str | None:
        inner_shape = shape if self.lift.comes_first else Size(self.subspace.low_shape(shape))
        return self.subspace.misfit(shape) or self.inner.misfit(inner_shape)

    def shared_bytes(self, params: Iterable[Tensor]) -> int:
        return self.subspace.shared_bytes(params)

    def row_wise(self, param: Tensor, slot: Slot) -> bool:
        """Where the columns are compressed, so that the rows of the small gradient are those of the matrix."""
        parts = self.subspace.row_wise and self.lift.row_wise and self.feedback is None
        if not parts or self.lift.comes_first:
            return False
        like = torch.empty_like(param, device="meta")
        basis = self.subspace.init(like, slot)
        if self.subspace.side_of(basis, param.shape) != "right":
            return False
        low = torch.empty(self.subspace.low_shape_of(basis, param.shape), dtype=param.dtype, device="meta")
        return self.inner.row_wise(low, replace(slot, kept_axis=0))

    def refresh_due(self, state: State) -> bool:
        return counter(state, "updates_done") >= counter(state, "refresh_at")

    def refresh_counts(self, state: State) -> tuple[int, int]:
        return counter(state, "refreshes"), counter(state, "fallbacks")

    def moves_alone(self, state: State) -> bool:
        return self.subspace.moves_alone(state)

    def moved_keys(self, state: State) -> list[str]:
        return self.subspace.moved_keys(state)

    def find(self, grad: Tensor, state: State, grad_factor: float = 1.0) -> Move:
        if self.feedback is not None:
            grad = self.feedback.add(grad * grad_factor, state)
        names = self.moved_keys(state)
        trial = dict(state)
        for name in names:
            value = trial[name]
            trial[name] = value.clone() if isinstance(value, Tensor) else value
        moved = self.subspace.refresh(grad, trial)
        return Move(moved, {name: trial[name] for name in names})

    def compress(self, grad: Tensor, state: State, move: Move | None = None) -> Tensor:
        error = None
        if self.feedback is not None:
            grad = self.feedback.add(grad, state)
            error = self.feedback.before_move(grad, state, self.subspace)
        due = self.refresh_due(state)
        if due:
            self._refresh(grad, state, move)
        low = self.subspace.down(grad, state)
        if due:
            self.subspace.observe(grad, low, state)
        if self.feedback is not None and error is not None:
            self.feedback.after_move(error, low, state, self.subspace)
        return low

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        if self.lift.comes_first:
            compressed = self.subspace.up(compressed, state, param.shape).tensor()
        low_update = self.inner.update(compressed, state, param, rates, compressed if self.lift.comes_first else None)
        state["updates_done"] = counter(state, "updates_done") + 1
        return self.lift.lift(low_update, compressed, grad, self.subspace, state, param)

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        fused = self.fused
        if fused is None or isinstance(decay, Tensor) or not fused.serves(compressed, state, param, grad):
            super().apply(compressed, state, param, rates, decay, grad)
        else:
            fused.step(compressed, state, param, rates, decay, grad)

    def at_once(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float,
        grad_factor: float,
        seed: int | None,
    ) -> Tensor | None:
        fused = self.fused
        if fused is None or isinstance(decay, Tensor) or self.refresh_due(state):
            return None
        if not fused.serves(grad, state, param):
            return None
        return fused.whole_step(grad, state, param, rates, decay, grad_factor, seed)

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return self.inner.decay_scale(param)

    def settle(self, state: State, rates: Rates) -> None:
        self.subspace.settle(state, rates)

    def _refresh(self, grad: Tensor, state: State, move: Move | None) -> None:
        started = counter(state, "refreshes") > 0
        before = self.subspace.snapshot(state) if self.on_refresh == "rotate" and started else None
        moved = self.subspace.refresh(grad, state) if move is None else _taken(move, state)
        self.subspace.schedule_next(state, counter(state, "updates_done"), moved)
        if moved and before is not None:
            self.inner.rotate(state, self.subspace.change(before, state))
        if moved and self.on_refresh == "reset":
            self._reset_inner(grad, state)

    def _reset_inner(self, grad: Tensor, state: State) -> None:
        for key, fresh in self._init_inner(grad, Slot("", 0, 0.0, grad.dtype), state).items():
            value = state[key]
            if isinstance(value, Tensor):
                assert isinstance(fresh, Tensor)
                value.copy_(fresh)
            else:
                state[key] = fresh

    def _init_inner(self, full: Tensor, slot: Slot, basis: State) -> State:
        """Fresh state of the inner rule, for a matrix like `full` with this basis."""
        if self.lift.comes_first:
            return self.inner.init(full, slot)
        kept: dict[str, int | None] = {"left": 1, "right": 0, "both": None}
        inside = replace(slot, kept_axis=kept[self.subspace.side_of(basis, full.shape)])
        shape = self.subspace.low_shape_of(basis, full.shape)
        return self.inner.init(torch.empty(shape, dtype=full.dtype, device=full.device), inside)


def _taken(move: Move, state: State) -> bool:
    """The basis goes where it was found to; whether that is somewhere else."""
    for name, value in move.entries.items():
        if isinstance(value, Tensor):
            tensor_of(state, name).copy_(value)
        else:
            state[name] = value
    return move.moved
