"""Updates of low rank as the factors of a plain LoRA, as PEFT names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_options(rank: int, scale: float, dropout: float = 0.0) -> tuple[str, dict[str, Any]]:
    """PEFT's LoRA of this rank whose update is scale B A."""
    return "LORA", {"r": rank, "lora_alpha": rank * scale, "lora_dropout": dropout}


def lora_tensors(first: Tensor, second: Tensor) -> Mapping[str, Tensor]:
    """A (rank, in) and B (out, rank) under PEFT's names."""
    return {"lora_A.default.weight": first.detach(), "lora_B.default.weight": second.detach()}


def factors_of(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of this rank with B A nearest to `update`, found in float64; what a short side leaves over is 0."""
    left, values, right = torch.linalg.svd(update.detach().double(), full_matrices=False)
    root, spare = values.sqrt(), max(0, rank - len(values))
    first, second = F.pad((root[:, None] * right)[:rank], (0, 0, 0, spare)), F.pad((left * root)[:, :rank], (0, spare))
    return first.to(update.dtype), second.to(update.dtype)
