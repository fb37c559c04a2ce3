"""torch's Optimizer with state that is saved and loaded to the last bit, what is kept of rounded weights with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.fast_forward import Previous
from lowrank_train.optim.ranks import Ranks
from lowrank_train.optim.rounded_weights import KEYS, RoundedWeights
from lowrank_train.optim.transform import State, Transform


class ExactOptimizer(torch.optim.Optimizer):
    """Saves and loads state as it is: torch casts what it loads to the parameter's dtype.

    What `rounded_weights` keeps of a parameter lies apart from the state of its rule while training, and is saved with
    it.
    """

    previous: Previous
    rounded_weights: RoundedWeights
    ranks: Ranks
    transform_of: dict[Tensor, Transform]

    def state_of(self, param: Tensor) -> State:
        """All that is kept for a parameter now: the state of its rule, and what rounding left over of its weights."""
        if not self.ranks.is_kept(param):
            return {}
        return self.state.get(param, {}) | self.rounded_weights.existing(param)

    def kept_of(self, param: Tensor) -> State:
        """As `state_of`, with what a checkpoint does without."""
        before = self.previous.kept.get(param)
        return self.state_of(param) | ({} if before is None else {"before": before})

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        states = {
            number: self.ranks.as_saved(param, self.transform_of[param], self.state_of(param))
            for number, param in enumerate(self._parameters())
        }
        return packed | {"state": {number: state for number, state in states.items() if state}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError when the parameters are not the ones that were saved."""
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if mine["param_names"] != theirs["param_names"]:
                raise ValueError(f"the saved optimizer state of group {theirs['name']!r} is for other parameters")
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        super().load_state_dict(state_dict | {"state": {}})
        for param, state in zip(self._parameters(), saved, strict=True):
            kept = self.ranks.from_saved(param, self.transform_of[param], state)
            own = {key: _copied(value, param.device) for key, value in kept.items()}
            self.rounded_weights.restore(param, own)
            rule = {key: value for key, value in own.items() if key not in KEYS}
            if rule:
                self.state[param] = rule

    def _parameters(self) -> list[Tensor]:
        """In the order in which torch numbers them."""
        return [param for group in self.param_groups for param in group["params"]]


def _copied(value: Tensor | int, device: torch.device) -> Tensor | int:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def bytes_by_kind(states: Iterable[State]) -> dict[str, int]:
    """Bytes of the tensors of these states, by key; all parts of a basis are one kind."""
    bytes_of: dict[str, int] = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                kind = "basis" if key.startswith("basis") else key
                bytes_of[kind] = bytes_of.get(kind, 0) + value.numel() * value.element_size()
    return bytes_of
