"""The memory of any torch optimizer, for what happens to parameters between updates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.optimizer import TransformOptimizer


class TorchMoments:
    """`forget`, `mask` and `lr` of an optimizer that is not ours, such as torch.optim.AdamW in somebody's own loop."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def forget(self, param: Tensor) -> None:
        self._optimizer.state.pop(param, None)

    def mask(self, param: Tensor, keep: Callable[[str, Tensor], Tensor]) -> None:
        for name, value in self._optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                value.mul_(keep(name, value))

    def lr(self, param: Tensor) -> float:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return float(next(group["lr"] for group in groups if any(member is param for member in group["params"])))


def moments_of(optimizer: torch.optim.Optimizer) -> TransformOptimizer | TorchMoments:
    """What events may do to this optimizer's memory."""
    return optimizer if isinstance(optimizer, TransformOptimizer) else TorchMoments(optimizer)


def changing_weights(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Around what changes parameters between updates, so that what the optimizer keeps of their old values is void."""
    if isinstance(optimizer, TransformOptimizer):
        return optimizer.rounded_weights.changed_within()
    return nullcontext()
