"""Parameters that are asleep: frozen for now by an optimizer or a strategy, unlike those that the user froze."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_train.optim.transform import Slot, State, Transform

if TYPE_CHECKING:
    from lowrank_train.optim.served import Served

_ASLEEP = WeakTensorKeyDictionary()
"""The sleeping parameters. An optimizer built while a layer sleeps must take it in all the same: one that goes by
requires_grad alone never trains that layer, a fault of published code (LMFlow issue 726)."""


def is_asleep(param: Tensor) -> bool:
    """Whether `param` was put to sleep and not woken since."""
    return param in _ASLEEP


def is_trainable(param: Tensor) -> bool:
    """Whether `param` asks for a gradient, or will when it wakes."""
    return param.requires_grad or is_asleep(param)


def put_to_sleep(param: Tensor) -> None:
    """Ask for no gradient, and free the one there is."""
    param.requires_grad_(False)
    param.grad = None
    _ASLEEP[param] = True


def wake(param: Tensor) -> None:
    """Undo `put_to_sleep`; what was never put to sleep is left as it is."""
    if is_asleep(param):
        param.requires_grad_(True)
        del _ASLEEP[param]


class Activity:
    """Puts the parameters of one optimizer to sleep and wakes them as their state says, where their rule is clocked."""

    def __init__(self, transform_of: Mapping[Tensor, Transform], slots: Mapping[Tensor, Slot], ranks: Served) -> None:
        self._ranks = ranks
        self.asleep: set[Tensor] = set()
        self._clocked = [(param, rule, slots[param]) for param, rule in transform_of.items() if rule.clocked]

    def advance(self, state_of: Callable[[Tensor], State]) -> None:
        """One update is over, for parameters without a gradient too. State that goes is freed before any is made."""
        for param, rule, slot in self._clocked:
            rule.advance(state_of(param), self._ranks.like(param), slot)
        for param, rule, slot in self._clocked:
            rule.complete(state_of(param), self._ranks.like(param), slot)
            self._ranks.keep_own(param, rule, state_of(param))

    def follow(self, states: Mapping[Tensor, State]) -> None:
        """Ask for gradients where the state has a use for them; what has no state yet is at its beginning."""
        for param, rule, slot in self._clocked:
            parameter, like = self._ranks.parameter(param), self._ranks.like(param)
            state = states.get(param) or rule.init(torch.empty_like(like, device="meta"), slot)
            if not rule.wants_gradient(state):
                put_to_sleep(parameter)
                param.grad = None
                self.asleep.add(param)
            elif param in self.asleep:
                self.asleep.remove(param)
                wake(parameter)
