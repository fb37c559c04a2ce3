"""What one update of the optimizer did: gradient norms, moves of the basis, gradients that were not finite."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
        }


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
