"""What one update of the optimizer did: gradient norms, moves of the basis, what was not finite, what was lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.transform import Move, State, Transform

logger = logging.getLogger(__name__)


@dataclass
class UpdateStats:
    """What one update did; norms stay on the device until they are asked for."""

    norms: dict[str, Tensor] = field(default_factory=dict)  # of the full gradient, by parameter name
    low_norms: dict[str, Tensor] = field(default_factory=dict)  # of the compressed gradient
    norm_known: bool = True
    refreshes: int = 0  # bases that moved
    kept_bases: int = 0  # bases that were due to move but stayed: the gradient was zero
    fallbacks: int = 0  # bases that moved by a fallback of the decomposition
    refresh_sec: float = 0.0
    skipped: dict[str, None] = field(default_factory=dict)  # parameters left alone: their gradient was not finite
    lost: list[Tensor] = field(default_factory=list)  # weights whose update rounding lost, by parameter, where counted
    counted_weights: int = 0  # of these parameters

    def compressed(
        self,
        transform: Transform,
        grad: Tensor,
        state: State,
        name: str,
        remarked: set[str],
        move: Move | None = None,
    ) -> Tensor:
        """transform.compress; where the basis is due to move it is timed, counted, and told if something was out of
        order, unless the name is among the `remarked`, which it joins."""
        if not transform.refresh_due(state):
            return transform.compress(grad, state)
        moves, fallbacks = transform.refresh_counts(state)
        started_sec = synchronized_sec(grad.device)
        low = transform.compress(grad, state, move)
        self.refresh_sec += synchronized_sec(grad.device) - started_sec
        new_moves, new_fallbacks = transform.refresh_counts(state)
        moved, fell_back = new_moves > moves, new_fallbacks > fallbacks
        self.refreshes += moved
        self.kept_bases += not moved
        self.fallbacks += fell_back
        remark = describe_refresh(name, moved, fell_back)
        if remark is not None and name not in remarked:
            remarked.add(name)
            logger.warning(remark)
        return low

    def moves(self) -> tuple[int, int, int]:
        """Bases that moved, bases that stayed, and fallbacks, so far."""
        return self.refreshes, self.kept_bases, self.fallbacks

    def count_moves(self, more: Sequence[int]) -> None:
        """Those of `moves` that happened elsewhere."""
        self.refreshes, self.kept_bases, self.fallbacks = (
            here + there for here, there in zip(self.moves(), more, strict=True)
        )

    def count_lost(self, lost: Tensor | None, param: Tensor) -> None:
        """How many of a parameter's weights have lost their update to rounding; None: not counted."""
        if lost is not None:
            self.lost.append(lost)
            self.counted_weights += param.numel()

    def as_dict(self) -> dict[str, Any]:
        return {
            "grad_norm": total_norm(self.norms) if self.norm_known else None,
            "grad_norm_projected": total_norm(self.low_norms),
            "refreshes": self.refreshes,
            "kept_bases": self.kept_bases,
            "refresh_fallbacks": self.fallbacks,
            "refresh_sec": self.refresh_sec,
            "skipped_tensors": len(self.skipped),
            "skipped_names": list(self.skipped),
            "lost_updates_pct": self._lost_updates_pct(),
        }

    def _lost_updates_pct(self) -> float | None:
        """Of the weights counted; None where none were."""
        return 100 * sum(torch.stack(self.lost).tolist()) / self.counted_weights if self.lost else None


def synchronized_sec(device: torch.device) -> float:
    """The clock, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def norm(tensor: Tensor) -> Tensor:
    """Euclidean norm, 0-dimensional, accumulated in float32 or wider."""
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def total_norm(norms: dict[str, Tensor]) -> float:
    """The norm of several tensors from the norm of each, the same whatever the order they were measured in."""
    if not norms:
        return 0.0
    values = torch.stack([norms[name] for name in sorted(norms)]).tolist()
    return math.sqrt(sum(value * value for value in values))


def describe_refresh(name: str, moved: bool, fell_back: bool) -> str | None:
    """What a user should know of a move of the basis that was not an ordinary one."""
    if not moved:
        return f"the gradient of {name} is zero; its basis stays, and moves as soon as there is a gradient"
    if fell_back:
        return (
            f"the singular value decomposition of the gradient of {name} did not converge; eigenvectors took its place"
        )
    return None
