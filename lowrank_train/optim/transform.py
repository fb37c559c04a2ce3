"""The protocol of an update rule: one tensor at a time, state a flat dictionary of tensors and integers.

Legend of the shape suffixes in this folder: M rows (output features), N columns (input features), R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank_train.optim.direction import Direction

State = dict[str, Tensor | int]


class Change(Protocol):
    """From coordinates in the old basis to coordinates in the new one."""

    def __call__(self, low: Tensor, *, squared: bool = False) -> Tensor:
        """Transform a tensor of the compressed shape; `squared` with the squares of the coefficients."""


@dataclass(frozen=True)
class Slot:
    """What a rule may know of the parameter it serves besides the tensor itself."""

    name: str
    seed: int  # from (run seed, parameter name): a reordered model draws the same numbers
    phase: float  # in [0, 1): the parameter's place among its group, to spread work over steps
    dtype: torch.dtype  # in which floating-point state is stored
    group: tuple[str, ...] = ()  # the names of all parameters that the rule serves, in the model's order
    kept_axis: int | None = None  # in a subspace: the axis of the small gradient that is not compressed; else None


@dataclass(frozen=True)
class Rates:
    """The learning rate of this update and the one before its schedule, for the few rules that need them."""

    lr: float
    base_lr: float


@dataclass(frozen=True)
class Move:
    """What a move of a basis has come to: whether it moved, and the entries of the state that say where to."""

    moved: bool
    entries: State


class Transform(ABC):
    """An update rule in two phases, so that a gradient can be freed before the step is taken.

    `compress` does whatever must see the whole gradient (moving the basis when that is due, projecting) and is linear
    in the gradient while the basis rests: compressed gradients of micro-batches may be added up. `update` turns the
    compressed gradient into a direction. A rule on the full tensor compresses to the gradient itself.
    """

    needs_gradient: bool = False  # update() wants the full gradient too, so it cannot be freed early
    compresses: bool = False  # compress() returns something smaller than the gradient
    accumulates: bool = True  # compress() is linear in the gradient, so that micro-batches may be compressed one by one
    weight_decay_first: bool = True  # decoupled decay before the update (torch) or after it (transformers)
    reads_weights: bool = False  # update() looks at each weight, of which a subspace has no small copy
    needs_lines: bool = False  # goes by the lines that a subspace leaves uncompressed, so one side must stay so
    maskable: bool = False  # keeps one number for each of the parameter's, so that some can be made zero: see `mask`
    elementwise: bool = False  # treats each number by itself, so that any flat piece of tensors will do
    clocked: bool = False  # what a tensor does changes with time: `advance` and `complete` after every update

    @abstractmethod
    def init(self, param: Tensor, slot: Slot) -> State:
        """Fresh state; must also run on the meta device, where it is only counted."""

    def misfit(self, shape: torch.Size) -> str | None:
        """Why a tensor of this shape cannot be served by the rule; None if it can."""
        return None

    def shared_bytes(self, params: Iterable[Tensor]) -> int:
        """Bytes that serve all these parameters together and are the state of none."""
        return 0

    def row_wise(self, param: Tensor, slot: Slot) -> bool:
        """Whether an update of some rows needs nothing of the others, while the basis rests.

        Then rows that lie on different devices are served apart: every state tensor as long as the parameter has one
        line for each of its rows, and all others do not depend on them. Must run on the meta device.
        """
        return self.elementwise

    def refresh_due(self, state: State) -> bool:
        """Whether the next compress() will move the basis."""
        return False

    def refresh_counts(self, state: State) -> tuple[int, int]:
        """How often the basis has moved, and how often only by a fallback of the decomposition."""
        return 0, 0

    def moves_alone(self, state: State) -> bool:
        """Whether the move that is due is work worth dividing: one process does it by `find` and tells the others."""
        return False

    def moved_keys(self, state: State) -> list[str]:
        """The entries of the state that a move changes."""
        return []

    def find(self, grad: Tensor, state: State, grad_factor: float = 1.0) -> Move:
        """The move that is due, given the whole gradient. Nothing is changed: compress() takes it in.

        grad_factor: of clipping, for a rule that adds what earlier gradients left to this one.
        """
        raise AssertionError("no basis")

    def compress(self, grad: Tensor, state: State, move: Move | None = None) -> Tensor:
        """The part of the gradient that `update` works on. `move`: where the basis goes, if that is found already."""
        return grad

    @abstractmethod
    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        """Advance the state in place and return the direction, before -lr.

        `grad` is the full gradient where `needs_gradient`, else None; it may be used as workspace.
        """

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        """param <- (1 - decay) param - lr * update(), the decay before or after as weight_decay_first says.

        A rule with a fused kernel for a whole tensor overrides this; the numbers stay those of `update`.
        """
        direction = self.update(compressed, state, param, rates, grad)
        decays = isinstance(decay, Tensor) or decay != 0
        if decays and self.weight_decay_first:
            param.mul_(1 - decay)
        direction.add_to_(param, -rates.lr)
        if decays and not self.weight_decay_first:
            param.mul_(1 - decay)

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
        """compress() and apply() of grad_factor * grad in one, which may overwrite it; the norm of compress(grad).

        seed: rounds bfloat16 and int8 weights at random, as lifted_update_ does; None: to the nearest.
        None where the rule has no kernel for it on these tensors, or its basis is due to move: then nothing is done.
        """
        return None

    def decay_scale(self, param: Tensor) -> Tensor | float:
        """What the learning rate is multiplied by inside the rule, which weight decay follows."""
        return 1.0

    def settle(self, state: State, rates: Rates) -> None:  # noqa: B027 nothing, for most
        """What happens after the direction has been added, such as moving a basis that was still in use."""

    def wants_gradient(self, state: State) -> bool:
        """Whether the tensor takes part in the next update; its requires_grad follows, where the rule is clocked."""
        return True

    def advance(self, state: State, param: Tensor, slot: Slot) -> None:  # noqa: B027 nothing, for most
        """An update is over, with this tensor or without it. Frees what is not needed any more."""

    def complete(self, state: State, param: Tensor, slot: Slot) -> None:  # noqa: B027 nothing, for most
        """After all tensors have advanced, so that what they free is there: makes what the next update needs."""

    def mask(self, state: State, keep: Callable[[str, Tensor], Tensor]) -> None:
        """Multiply each moment with keep(its name, itself). ValueError for a rule without one number a weight."""
        raise ValueError(
            f"{type(self).__name__} keeps no moment for each number of a parameter, so that none can be thinned out; "
            "use strategy.merge.moments=fresh or keep"
        )

    def rotate(self, state: State, change: Change) -> None:
        """Carry the state over to a new basis. ValueError where the rule has no way to."""
        raise ValueError(f"{type(self).__name__} cannot rotate its state to a new basis; use on_refresh keep or reset")


def counter(state: State, key: str) -> int:
    """An integer entry of a state."""
    value = state[key]
    assert isinstance(value, int)
    return value


def tensor_of(state: State, key: str) -> Tensor:
    """A tensor entry of a state."""
    value = state[key]
    assert isinstance(value, Tensor)
    return value


def multiply_(tensors: list[Tensor], by: Tensor | float) -> None:
    """Each in place; several in one launch, but for bfloat16, to which that would round the factor."""
    if len(tensors) > 1 and tensors[0].dtype is not torch.bfloat16:
        torch._foreach_mul_(tensors, by)
        return
    for tensor in tensors:
        tensor.mul_(by)
