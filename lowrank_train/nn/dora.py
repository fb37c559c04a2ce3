"""DoRA: LoRA on the direction of each row of a matrix, and a trained length for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear
from lowrank_train.nn.rounding import add_


@dataclass
class DoRA(LoRA):
    """W = diag(g / ||V||) V, V = W0 + s B A, ||V|| the norms of its rows; g, A and B are trained (arXiv 2402.09353)."""

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return DoRALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        if self.init in ("pissa", "olora"):
            raise ValueError(f"PEFT has no DoRA over what init={self.init} leaves of W0")
        kind, options = super().as_peft()
        return kind, options | {"use_dora": True}

    def lr_ratios(self) -> Mapping[str, float]:
        """LoRA+ takes g along with B, as peft's optimizer does with every vector."""
        return {"lora_B": self.lr_ratio_b, "magnitude": self.lr_ratio_b} if self.lr_ratio_b != 1 else {}


class DoRALinear(LoRALinear):
    """y = (x W0^T + s x A^T B^T) diag(g / ||V||) + bias, with g = `magnitude`, (out_features).

    ||V|| counts as a constant in backward (section 4.3 of the paper). `magnitude` begins as the norms of W0's rows, so
    that the output begins as it was, and is at least float32: in bfloat16 neither that nor a small update would hold.
    With dropout, the change against x W0^T sees the dropped x, as in peft.
    """

    choice = DoRA
    weights: DoRA

    def begin_(self) -> None:
        lengths = _row_norms(self.weight.detach())  # before init=pissa or olora takes a part out of W0
        super().begin_()
        self.magnitude = nn.Parameter(lengths)

    @torch.no_grad()
    def norms_of_direction(self) -> Tensor:
        """||V||, (out_features), in at least float32, without ever forming B A.

        ||V_i||^2 = ||W0_i||^2 + 2 s (W0 A^T)_i . B_i + s^2 B_i (A A^T) B_i^T, one product of 2 m n r operations.
        """
        scale = self.weights.scale
        first, second = self.factors
        base = _row_norms(self.weight)
        wide = second.to(base.dtype)
        crossed = ((self.weight @ first.T).to(base.dtype) * wide).sum(1)
        low = ((wide @ (first @ first.T).to(base.dtype)) * wide).sum(1)
        squares = base.square() + 2 * scale * crossed + scale**2 * low
        return squares.clamp_min(torch.finfo(base.dtype).tiny).sqrt()  # a row of zeros has no direction

    def dense_weight(self) -> Tensor:
        direction = super().dense_weight()
        if self.lora_A is None:
            return direction
        return (self.magnitude / self.norms_of_direction())[:, None] * direction

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        return {**super().adapter_tensors(base), "lora_magnitude_vector.default.weight": self.magnitude.detach()}

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_A is None:
            return F.linear(x, self.weight, self.bias)
        ratio = self.magnitude / self.norms_of_direction()
        first, second = self.factors
        if not (self.training and self.weights.dropout):
            update = self.weights.scale * F.linear(F.linear(x, first), second)
            y = (F.linear(x, self.weight) + update) * ratio.to(update.dtype)
            return y if self.bias is None else y + self.bias
        dropped = F.dropout(x, self.weights.dropout)
        update = self.weights.scale * F.linear(F.linear(dropped, first), second)
        changed = (ratio - 1).to(update.dtype) * F.linear(dropped, self.weight) + ratio.to(update.dtype) * update
        return F.linear(x, self.weight, self.bias) + changed

    @torch.no_grad()
    def fold_(self, number: int = 1) -> None:
        """W0 <- diag(g / ||V||) V; A anew, B = 0; g <- the norms of W0's rows, which is |g|."""
        if self.lora_A is None:
            return
        lacking = self.dense_weight() - self.kept_weight()
        add_(self.weight, lacking, self.weights.rounding, self.residue, self.origin, number)
        self.magnitude.copy_(_row_norms(self.weight))
        self._renew_factors(number)


def _row_norms(weight: Tensor) -> Tensor:
    """The norms of the rows in at least float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
