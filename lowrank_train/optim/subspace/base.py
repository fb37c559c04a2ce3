"""The protocol of a subspace with a stored orthonormal basis, and the rule that decides which side it compresses.

A basis has the layout (compressed dimension, R). Right: low = G B, shape (M, R). Left: low = B^T G, shape (R, N).
Both sides (GaLore's `full`): low = B_left^T G B_right, shape (R, R).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.transform import Slot, State, counter, tensor_of

SideRule = Literal["std", "reverse_std", "left", "right", "full"]
Side = Literal["left", "right", "both"]


def resolve_side(rule: SideRule, shape: Size | tuple[int, ...]) -> Side:
    """Which side of a (M, N) matrix is compressed; `std` takes the short one, and the right one of a square.

    GaLore's code guesses the side again from the shape of the small tensor when it projects back, and fails for wide
    matrices with a rank of at least M; here the shape of the weight alone decides.
    """
    rows, columns = shape
    if rule == "full":
        return "both"
    if rule == "std":
        return "right" if rows >= columns else "left"
    if rule == "reverse_std":
        return "left" if rows >= columns else "right"
    return rule


@dataclass
class Subspace(ABC):
    """A basis that moves every `every` updates, before the gradient is projected."""

    rank: int
    every: int = 200  # updates between two moves: GaLore's update_proj_gap
    side: SideRule = "std"
    stagger: bool = False  # spread the moves of the matrices over the interval instead of moving all at once

    def __post_init__(self) -> None:
        for name in ("rank", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.subspace.{name} is {getattr(self, name)}; it must be at least 1")

    def init(self, param: Tensor, slot: Slot) -> State:
        """Basis tensors (uninitialised until the first move, at the first update) and the clock of the moves."""
        rows, columns = param.shape
        side = resolve_side(self.side, param.shape)
        state: State = {"refresh_at": 0, "refreshes": 0, "fallbacks": 0, "seed": slot.seed, "phase_steps": 0}
        if self.stagger:
            state["phase_steps"] = int(slot.phase * self.every)
        for key, dimension in (("basis_left", rows), ("basis_right", columns)):
            if side in (key.removeprefix("basis_"), "both"):
                state[key] = torch.zeros(dimension, self.rank, dtype=slot.dtype, device=param.device)
        return state

    def low_shape(self, shape: Size) -> tuple[int, int]:
        """The shape of the projected gradient of a (M, N) matrix."""
        rows, columns = shape
        side = resolve_side(self.side, shape)
        return (rows if side == "right" else self.rank, columns if side == "left" else self.rank)

    def schedule_next(self, state: State, updates_done: int, moved: bool) -> None:
        """Set the next move; one that found nothing to move to is tried again at the next update."""
        first = counter(state, "refreshes") == 0
        if not moved:
            state["refresh_at"] = updates_done + 1
            return
        state["refreshes"] = counter(state, "refreshes") + 1
        phase = counter(state, "phase_steps")
        state["refresh_at"] = updates_done + (phase if first and phase else self.every)

    def refresh(self, grad: Tensor, state: State) -> bool:
        """Move the basis to fit `grad` (finite, (M, N)); False when the gradient is zero and the basis stays.

        Each new vector takes the sign that points along the vector it replaces (the first: its largest entry is made
        positive). Singular vectors have arbitrary signs, and moments that are kept would otherwise change their
        meaning with the LAPACK in use: a third of the displacement in one measurement.
        """
        matrix = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
        largest = matrix.abs().amax()
        if largest == 0:
            if counter(state, "refreshes") == 0:
                self._set(state, self._arbitrary(state))
            return False
        first = counter(state, "refreshes") == 0
        new = self.find(matrix / largest, state)  # products of tiny or huge gradients would leave float32's range
        old = None if first else {key: tensor_of(state, key) for key in new}
        self._set(state, {key: align_signs(basis, old[key] if old else None) for key, basis in new.items()})
        return True

    @abstractmethod
    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        """New orthonormal bases, (dimension, R) each, by state key, for a finite non-zero float matrix (M, N)."""

    def down(self, full: Tensor, state: State) -> Tensor:
        """Project a (M, N) tensor; linear in it."""
        left, right = state.get("basis_left"), state.get("basis_right")
        low = full
        if isinstance(left, Tensor):
            low = left.to(full.dtype).T.mm(low)
        if isinstance(right, Tensor):
            low = low.mm(right.to(full.dtype))
        return low

    def up(self, low: Tensor, state: State, shape: Size) -> tuple[Tensor, Tensor]:
        """Two factors (M, R) and (R, N) whose product is the back-projection of `low`."""
        left, right = state.get("basis_left"), state.get("basis_right")
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return left.to(low.dtype).mm(low), right.to(low.dtype).T
        if isinstance(left, Tensor):
            return left.to(low.dtype), low
        assert isinstance(right, Tensor)
        return low, right.to(low.dtype).T

    def _set(self, state: State, bases: dict[str, Tensor]) -> None:
        for key, basis in bases.items():
            tensor_of(state, key).copy_(basis)

    def _arbitrary(self, state: State) -> dict[str, Tensor]:
        keys = [key for key in ("basis_left", "basis_right") if key in state]
        return {key: torch.linalg.qr(gaussian(tensor_of(state, key), state)).Q for key in keys}


def align_signs(new: Tensor, old: Tensor | None) -> Tensor:
    """Flip columns of `new` (dimension, R) to agree with `old`, or to have a positive largest entry."""
    if old is None:
        agreement = new.gather(0, new.abs().argmax(0, keepdim=True)).squeeze(0)
    else:
        agreement = (new * old.to(new.dtype)).sum(0)
    return torch.where(agreement < 0, -new, new)


def gaussian(like: Tensor, state: State) -> Tensor:
    """Standard normal numbers, the same on every device, drawn from (parameter seed, number of moves)."""
    generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator, dtype=wide).to(like.device)
