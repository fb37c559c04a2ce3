"""The protocol of a subspace, the rule that decides which side it compresses, and when it moves.

A basis B has the layout (compressed dimension, R). Right: low = G B, shape (M, R). Left: low = B^T G, shape (R, N).
Both sides (GaLore's `full`): low = B_left^T G B_right, shape (R, R).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Direction, wide
from lowrank_train.optim.subspace.lazy import Lazy
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
    needs_state: ClassVar[frozenset[str]] = frozenset()  # what a move reads of the inner rule's state
    moved: ClassVar[tuple[str, ...]] = ()  # how the names of the entries begin that say where the basis is
    by_seed: ClassVar[bool] = False  # a move is a draw by the seed, the same wherever it is made
    row_wise: ClassVar[bool] = True  # on the right side rows are projected apart, and only a move sees them all

    def __post_init__(self) -> None:
        for name in ("rank", "every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"strategy.subspace.{name} is {getattr(self, name)}; it must be at least 1")
        if self.density is not None and not 0 < self.density <= 1:
            way_out = "; no subspace at all is strategy=frugal_block strategy.blocks.density=0" * (self.density == 0)
            raise ValueError(f"strategy.subspace.density is {self.density}; it must be above 0 and at most 1{way_out}")
        if (self.rank is None) == (self.density is None):
            raise ValueError("strategy.subspace needs either rank or density, and not both")
        self.source: BasisSource | None = None  # set by whoever replays a recorded run
        self.any_rank = False  # one above min(M, N) is taken as published code takes it: cut, or drawn all the same
        self.lazy: Lazy | None = None

    def be_lazy(self, rule: Lazy) -> None:
        """Move less often where the basis hardly turns. ValueError where that cannot be known or is not ours to say."""
        name = type(self).__name__
        if type(self).schedule_next is not Subspace.schedule_next:
            raise ValueError(f"strategy.refresh is for subspaces that move at intervals; {name} has a clock of its own")
        two_sided = len(self.low_shape(Size((64, 64)))) != 2 or self.side == "full"
        if type(self).change is Subspace.change or not type(self).orthonormal or two_sided:
            raise ValueError(
                f"strategy.refresh compares successive orthonormal bases of one side, which the subspace {name} with "
                f"side={self.side} has not; leave strategy.refresh out"
            )
        self.lazy = rule

    def store_basis_as(self, fmt: str) -> None:
        """Keep the basis as strategy.storage.basis says. ValueError where there is none that could be kept so."""
        raise ValueError(
            f"strategy.storage.basis={fmt}: the subspace {type(self).__name__} keeps no dense basis, but what it is "
            "chosen by, which stays as it is; use strategy.storage.basis=null"
        )

    def init(self, param: Tensor, slot: Slot) -> State:
        """The clock of the moves, and what `_init_basis` adds; the basis is unset until the first update."""
        clock: State = {"refresh_at": 0, "refreshes": 0, "fallbacks": 0, "seed": slot.seed, "phase_steps": 0}
        if self.stagger:
            clock["phase_steps"] = int(slot.phase * self.every)
        if self.lazy is not None:
            clock |= self.lazy.init(self.every)
        return clock | self._init_basis(param, slot)

    def low_shape(self, shape: Size) -> tuple[int, ...]:
        """The shape of the projected gradient of a (M, N) matrix."""
        rows, columns = shape
        side, rank = resolve_side(self.side, shape), self.rank_for(shape)
        return (rows if side == "right" else rank, columns if side == "left" else rank)

    def low_shape_of(self, state: State, shape: Size) -> tuple[int, ...]:
        """As `low_shape`, of the matrix with this state: some subspaces go by a matrix's name, not its shape alone."""
        return self.low_shape(shape)

    def side_of(self, state: State, shape: Size) -> Side:
        """The side that is compressed in the matrix with this state."""
        return resolve_side(self.side, shape)

    def rank_for(self, shape: Size) -> int:
        """Dimensions kept of a (M, N) matrix."""
        if self.rank is not None:
            return self.rank
        assert self.density is not None
        side = resolve_side(self.side, shape)
        dimension = {"left": shape[0], "right": shape[1], "both": min(shape)}[side]
        return max(1, round(dimension * self.density))

    def shared_bytes(self, params: Iterable[Tensor]) -> int:
        """Bytes that serve all these matrices together and are the state of none."""
        return 0

    def misfit(self, shape: Size) -> str | None:
        """Why a matrix of this shape cannot be projected so; None if it can."""
        if self.rank is not None and self.rank > min(shape) and not self.any_rank:
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
        if first and phase:
            state["refresh_at"] = updates_done + phase
        elif self.lazy is not None:
            state["refresh_at"] = self.lazy.next_move(state, updates_done)
        else:
            state["refresh_at"] = updates_done + self.every

    def refresh(self, grad: Tensor, state: State) -> bool:
        """Move the basis, given a finite gradient (M, N); False when the gradient is zero and the basis stays."""
        if self.lazy is None or counter(state, "refreshes") == 0:
            return self._moved(grad, state)
        before = self.snapshot(state)
        moved = self._moved(grad, state)
        if moved:
            self.lazy.remember(self._overlap(before, state, grad), state)
        return moved

    @property
    def always_moves(self) -> bool:
        """Whether every update has a basis of its own."""
        return self.every == 1

    def moves_alone(self, state: State) -> bool:
        """Whether a move is work worth dividing among processes: not at every update, nor where it is a draw."""
        return not self.by_seed and (not self.always_moves or counter(state, "refreshes") == 0)

    def moved_keys(self, state: State) -> list[str]:
        """The entries of the state that `refresh` changes."""
        return [name for name in state if name.startswith((*self.moved, "fallbacks", "overlap_"))]

    def _overlap(self, before: Tensor, state: State, grad: Tensor) -> float:
        """How little the basis has turned, by what `change` makes of the unit: B_new^T B_old or its transpose."""
        low, full = self.low_shape_of(state, grad.shape), grad.shape
        rank, dimension = next(((r, d) for r, d in zip(low, full, strict=True) if r < d), (min(low), min(low)))
        unit = torch.eye(rank, dtype=wide(grad).dtype, device=grad.device)
        assert self.lazy is not None
        return self.lazy.measured(self.change(before, state)(unit), dimension)

    def _moved(self, grad: Tensor, state: State) -> bool:
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

    def observe(self, grad: Tensor, low: Tensor, state: State) -> None:  # noqa: B027 nothing, for most
        """Learn from a gradient and its projection, where the basis was due to move."""

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


def require_one_side(subspace: Subspace) -> None:
    """ValueError for a subspace that cannot compress both sides and is told to."""
    if subspace.side == "full":
        raise ValueError(
            f"strategy.subspace.side is full, but the subspace {type(subspace).__name__} compresses one side; use std"
        )


def largest_entry(matrix: Tensor) -> Tensor:
    """max |x|, 0-dimensional, in one pass without a temporary, 17 times faster than by abs() on a CPU thread."""
    least, greatest = torch.aminmax(matrix)
    return torch.maximum(-least, greatest)


def gaussian(shape: Size | tuple[int, ...], state: State, like: Tensor) -> Tensor:
    """Standard normal numbers, the same on every device, drawn from (parameter seed, number of moves)."""
    generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=generator, device="cpu", dtype=wide).to(like.device)
