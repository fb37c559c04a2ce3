"""A LoRA between two frozen factors: NoRA, whose outer factors come from W0, and LoRA-Mini, which draws them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.as_lora import lora_options, lora_tensors
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept, uniform
from lowrank_train.nn.three_factors import leading


@dataclass
class NestedLoRA(Weights):
    """W = W0 + s L B A R, L (out, outer_rank) and R (outer_rank, in) frozen, A (rank, outer_rank) and B trained."""

    rank: int = 8
    outer_rank: int = 64
    alpha: float = 16.0  # s = alpha / rank

    def __post_init__(self) -> None:
        for name in ("rank", "outer_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.weights.{name} is {getattr(self, name)}; it must be at least 1")
        if self.rank > self.outer_rank:
            raise ValueError(
                f"strategy.weights.rank is {self.rank}, above strategy.weights.outer_rank, which is {self.outer_rank}"
            )

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if self.outer_rank > min(shape):
            side = f"the short side of {shape[0]} x {shape[1]}"
            return f"strategy.weights.outer_rank is {self.outer_rank}, above {side}"
        return None

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    @abstractmethod
    def outer(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor]:
        """L and R; of a meta tensor their shapes alone count."""

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return NestedLoRALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return lora_options(self.rank, self.scale)


@dataclass
class NoRA(NestedLoRA):
    """L = U_q sqrt(S_q), R = sqrt(S_q) V_q^T of W0 = U S V^T, q = outer_rank (Lin et al., arXiv 2408.10280)."""

    def outer(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor]:
        if weight.is_meta:
            rows, columns = weight.shape
            return weight.new_empty(rows, self.outer_rank), weight.new_empty(self.outer_rank, columns)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        left, values, right = leading(wide, self.outer_rank)
        root = values.sqrt()
        return left * root, root[:, None] * right


@dataclass
class LoRAMini(NestedLoRA):
    """L and R are drawn as a linear layer's weights, uniform in +-1/sqrt(inputs) (Singh et al., arXiv 2411.15804)."""

    def outer(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        return (
            uniform((rows, self.outer_rank), 1 / math.sqrt(self.outer_rank), weight, origin.generator("left")),
            uniform((self.outer_rank, columns), 1 / math.sqrt(columns), weight, origin.generator("right")),
        )


class NestedLoRALinear(ReparamLinear):
    """y = x W0^T + s x R^T A^T B^T L^T + bias, with `weight` W0, L, R as `left`, `right`, and `lora_A`, `lora_B`.

    A begins uniform in +-1/sqrt(outer_rank), B as 0, so that the layer begins as it was.
    """

    choice = NoRA  # of the other: LoRAMini(rank=8).layer(linear, Origin())
    weights: NestedLoRA

    def __init__(self, linear: nn.Linear, weights: NestedLoRA, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        weight, width = linear.weight.detach(), weights.outer_rank
        self.weight = kept(weight)
        left, right = weights.outer(weight, origin)
        self.left, self.right = kept(left.to(weight.dtype).contiguous()), kept(right.to(weight.dtype).contiguous())
        drawn = uniform((weights.rank, width), 1 / math.sqrt(width), weight, origin.generator("lora_A"))
        self.lora_A = nn.Parameter(drawn)
        self.lora_B = nn.Parameter(weight.new_zeros(width, weights.rank))

    def outer_products(self) -> tuple[Tensor, Tensor]:
        """A R (rank, in) and L B (out, rank), in at least float32: a plain LoRA."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        first, second, left, right = (part.to(wide) for part in (self.lora_A, self.lora_B, self.left, self.right))
        return first @ right, left @ second

    def dense_weight(self) -> Tensor:
        first, second = self.outer_products()
        return self.weight.to(first.dtype) + self.weights.scale * (second @ first)

    @torch.no_grad()
    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        return lora_tensors(*self.outer_products())

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.right), self.lora_A)
        update = F.linear(F.linear(low, self.lora_B), self.left)
        return F.linear(x, self.weight, self.bias) + self.weights.scale * update
