"""The protocol of a subspace, the rule that decides which side it compresses, and when it moves.

A basis B has the layout (compressed dimension, R). Right: low = G B, shape (M, R). Left: low = B^T G, shape (R, N).
Both sides (GaLore's `full`): low = B_left^T G B_right, shape (R, R).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Direction
from lowrank_train.optim.transform import Change, Rates, Slot, State, counter

SideRule = Literal["std", "std_left", "reverse_std", "left", "right", "full"]
Side = Literal["left", "right", "both"]
BasisSource = Callable[[int, int, Tensor], Tensor | None]
"""(parameter seed, 1-based update, gradient) -> what to use from that update on, or None for one's own."""


def resolve_side(rule: SideRule, shape: Size | tuple[int, ...]) -> Side:
    """Which side of a (M, N) matrix is compressed.

    `std` takes the short one, and the right one of a square; `std_left`, which is LDAdam's, the left one of a square.

    GaLore's code guesses the side again from the shape of the small tensor when it projects back, and fails for wide
    matrices with a rank of at least M; here the shape of the weight alone decides.
    """
    rows, columns = shape
    if rule == "full":
        return "both"
    if rule == "std":
        return "right" if rows >= columns else "left"
    if rule == "std_left":
        return "right" if rows > columns else "left"
    if rule == "reverse_std":
        return "left" if rows >= columns else "right"
    return rule


@dataclass
class Subspace(ABC):
    """A small space for the gradient of a matrix, that moves every `every` updates.

    It moves before the gradient is projected, unless `moves_after` says that an update still uses the old basis.
    """

    rank: int | None = None  # dimensions kept; or density
    density: float | None = None  # dimensions kept as a share of the compressed side
    every: int = 200  # updates between two moves: GaLore's update_proj_gap
    side: SideRule = "std"
    stagger: bool = False  # spread the moves of the matrices over the interval instead of moving all at once

    orthonormal: ClassVar[bool] = True  # up(down(G)) is a projection of G

    def __post_init__(self) -> None:
        for name in ("rank", "every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"strategy.subspace.{name} is {getattr(self, name)}; it must be at least 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"strategy.subspace.density is {self.density}; it must be above 0 and at most 1")
        if (self.rank is None) == (self.density is None):
            raise ValueError("strategy.subspace needs either rank or density, and not both")
        self.source: BasisSource | None = None  # set by whoever replays a recorded run

    def init(self, param: Tensor, slot: Slot) -> State:
        """The clock of the moves, and what `_init_basis` adds; the basis is unset until the first update."""
        clock: State = {"refresh_at": 0, "refreshes": 0, "fallbacks": 0, "seed": slot.seed, "phase_steps": 0}
        if self.stagger:
            clock["phase_steps"] = int(slot.phase * self.every)
        return clock | self._init_basis(param, slot)

    def low_shape(self, shape: Size) -> tuple[int, ...]:
        """The shape of the projected gradient of a (M, N) matrix."""
        rows, columns = shape
        side, rank = resolve_side(self.side, shape), self.rank_for(shape)
        return (rows if side == "right" else rank, columns if side == "left" else rank)

    def rank_for(self, shape: Size) -> int:
        """Dimensions kept of a (M, N) matrix."""
        if self.rank is not None:
            return self.rank
        assert self.density is not None
        side = resolve_side(self.side, shape)
        dimension = {"left": shape[0], "right": shape[1], "both": min(shape)}[side]
        return max(1, round(dimension * self.density))

    def misfit(self, shape: Size) -> str | None:
        """Why a matrix of this shape cannot be projected so; None if it can."""
        if self.rank is not None and self.rank > min(shape):
            return f"strategy.subspace.rank is {self.rank}, but must be at most {min(shape)}"
        return None

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
        """Move the basis, given a finite gradient (M, N); False when the gradient is zero and the basis stays."""
        if self.source is not None:
            given = self.source(counter(state, "seed"), counter(state, "updates_done") + 1, grad)
            if given is not None:
                self.take(given, state, grad.shape)
                return True
        return self.move(grad, state)

    @abstractmethod
    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        """The tensors that hold the basis."""

    @abstractmethod
    def move(self, grad: Tensor, state: State) -> bool:
        """As `refresh`, by the subspace's own rule."""

    @abstractmethod
    def take(self, given: Tensor, state: State, shape: Size) -> None:
        """Use a basis from outside, in the layout in which the published codes store theirs."""

    @abstractmethod
    def down(self, full: Tensor, state: State) -> Tensor:
        """Project a (M, N) tensor; linear in it."""

    @abstractmethod
    def up(self, low: Tensor, state: State, shape: Size) -> Direction:
        """The (M, N) tensor that `low` stands for."""

    @abstractmethod
    def subtract_(self, full: Tensor, low: Tensor, state: State, by: float = 1.0) -> Tensor:
        """full -= by * up(low) in place; returns `full`."""

    def snapshot(self, state: State) -> Tensor:
        """What `change` needs to know of the basis before it moves."""
        raise ValueError(f"the subspace {type(self).__name__} cannot rotate moments to its new basis")

    def change(self, before: Tensor, state: State) -> Change:
        """From coordinates in the basis of `snapshot` to coordinates in the basis in force."""
        raise ValueError(f"the subspace {type(self).__name__} cannot rotate moments to its new basis")

    def settle(self, state: State, rates: Rates) -> None:  # noqa: B027 nothing, for most
        """After the update has been made with the basis in force."""


def gaussian(shape: Size | tuple[int, ...], state: State, like: Tensor) -> Tensor:
    """Standard normal numbers, the same on every device, drawn from (parameter seed, number of moves)."""
    generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=wide).to(like.device)
