"""Parameters that one rule serves at one multiple of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_train.optim.transform import Slot, Transform


@dataclass
class Group:
    """Parameters served by one rule."""

    name: str
    transform: Transform
    params: list[tuple[str, Tensor]]
    slots: list[Slot]
    lr_ratio: float = 1.0  # times the learning rate


def listed(group: Group, lr: float) -> dict[str, Any]:
    """A group in torch's form."""
    return {"params": group.params, "name": group.name, "lr": lr * group.lr_ratio, "lr_ratio": group.lr_ratio}
