"""The protocol of an update rule: one tensor at a time, state a flat dictionary of tensors and integers.

Legend of the shape suffixes in this folder: M rows (output features), N columns (input features), R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor | int]


@dataclass(frozen=True)
class Slot:
    """What a rule may know of the parameter it serves besides the tensor itself."""

    name: str
    seed: int  # from (run seed, parameter name): a reordered model draws the same numbers
    phase: float  # in [0, 1): the parameter's place among its group, to spread work over steps
    dtype: torch.dtype  # in which floating-point state is stored


class Direction(Protocol):
    """An update before -lr, left unevaluated until it is added, so that no full-size temporary is made in vain."""

    def tensor(self) -> Tensor:
        """The direction as one tensor of the parameter's shape."""

    def add_to_(self, param: Tensor, alpha: float) -> None:
        """param += alpha * direction, in place."""


@dataclass
class Dense(Direction):
    """A direction that is a tensor."""

    value: Tensor

    def tensor(self) -> Tensor:
        return self.value

    def add_to_(self, param: Tensor, alpha: float) -> None:
        param.add_(self.value, alpha=alpha)


@dataclass
class Quotient(Direction):
    """factor * numerator / denominator, elementwise."""

    numerator: Tensor
    denominator: Tensor
    factor: float

    def tensor(self) -> Tensor:
        return self.numerator.div(self.denominator).mul_(self.factor)

    def add_to_(self, param: Tensor, alpha: float) -> None:
        if param.dtype == self.numerator.dtype:
            param.addcdiv_(self.numerator, self.denominator, value=alpha * self.factor)
        else:  # mixed dtypes: add_ computes in the wider one and rounds once
            param.add_(self.numerator / self.denominator, alpha=alpha * self.factor)


@dataclass
class Product(Direction):
    """scale * left @ right, the shape of a back-projected update."""

    left_MR: Tensor
    right_RN: Tensor
    scale: float

    def tensor(self) -> Tensor:
        return self.left_MR.mm(self.right_RN).mul_(self.scale)

    def add_to_(self, param: Tensor, alpha: float) -> None:
        param.addmm_(self.left_MR.to(param.dtype), self.right_RN.to(param.dtype), alpha=alpha * self.scale)


class Transform(ABC):
    """An update rule in two phases, so that a gradient can be freed before the step is taken.

    `compress` does whatever must see the whole gradient (moving the basis when that is due, projecting) and is linear
    in the gradient while the basis rests: compressed gradients of micro-batches may be added up. `update` turns the
    compressed gradient into a direction. A rule on the full tensor compresses to the gradient itself.
    """

    needs_gradient: bool = False  # update() wants the full gradient too, so it cannot be freed early
    compresses: bool = False  # compress() returns something smaller than the gradient
    weight_decay_first: bool = True  # decoupled decay before the update (torch) or after it (transformers)

    @abstractmethod
    def init(self, param: Tensor, slot: Slot) -> State:
        """Fresh state; must also run on the meta device, where it is only counted."""

    def refresh_due(self, state: State) -> bool:
        """Whether the next compress() will move the basis."""
        return False

    def refresh_counts(self, state: State) -> tuple[int, int]:
        """How often the basis has moved, and how often only by a fallback of the decomposition."""
        return 0, 0

    def compress(self, grad: Tensor, state: State) -> Tensor:
        """The part of the gradient that `update` works on."""
        return grad

    @abstractmethod
    def update(self, compressed: Tensor, state: State, param: Tensor, grad: Tensor | None = None) -> Direction:
        """Advance the state in place and return the direction. `grad` is None when it has been freed."""


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
