"""LoRA-SB: frozen outer factors and a small trained one, all three from the first step of full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_train.nn.as_lora import lora_options, lora_tensors
from lowrank_train.nn.events import Event, Moments, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept, sum_over_ranks_

WATCHED_UPDATES = 2  # whose gradients are added up: the first update of a warm-up has the rate 0, the second that of D


@dataclass
class LoRASB(Weights):
    """W = W0 + L C R, L (out, rank), C (rank, rank), R (rank, in), C alone trained (Ponkshe et al., arXiv 2411.19557).

    L, C, R are the leading singular vectors and values of D = -lr sign(G), the first step that Adam would take of W0,
    with lr = peak / warm-up steps, where there is a warm-up. The model goes on from W0 + L C R.

    G is the sum of the gradients of W0 over the first two updates (50 samples in the paper), which leave the matrix as
    it is; lr is the rate of the second.
    """

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LoRASBLinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return lora_options(self.rank, 1.0)

    def events(self) -> Sequence[Event]:
        def begin(layer: LoRASBLinear, number: int, moments: Moments) -> None:
            layer.begin_(moments.lr(layer.core))
            moments.forget(layer.core)

        return [Event("factors of the first step", each(LoRASBLinear, begin), WATCHED_UPDATES, restructures=True)]


class LoRASBLinear(ReparamLinear):
    """y = x W0^T + x R^T C^T L^T + bias, with `weight` W0, and L, C, R as `left`, `core` (at least float32), `right`.

    At first these are 0, and `gradient` (out, in) adds up what the backward passes of training find for W0.
    """

    choice = LoRASB
    weights: LoRASB

    def __init__(self, linear: nn.Linear, weights: LoRASB, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.weight = kept(linear.weight.detach())
        rank, wide = weights.rank, torch.promote_types(self.weight.dtype, torch.float32)
        self.left = kept(self.weight.new_zeros(self.out_features, rank))
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=wide, device=self.weight.device))
        self.right = kept(self.weight.new_zeros(rank, self.in_features))
        self.gradient: Tensor | None
        self.register_buffer("gradient", torch.zeros_like(self.weight))

    @torch.no_grad()
    def begin_(self, lr: float) -> None:
        """Put the leading part of -lr sign(G) into the factors, and stop watching."""
        assert self.gradient is not None, "the factors are there already"
        sum_over_ranks_(self.gradient)
        left, values, right = torch.linalg.svd(-self.gradient.to(self.core.dtype).sign(), full_matrices=False)
        rank = self.weights.rank
        self.left.copy_(left[:, :rank])
        self.core.copy_(lr * values[:rank].diag())
        self.right.copy_(right[:rank])
        self.gradient = None

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        if "core" in shapes:
            watching = "gradient" in shapes
            if watching != (self.gradient is not None):
                self.gradient = torch.zeros_like(self.weight) if watching else None

    def dense_weight(self) -> Tensor:
        wide = self.core.dtype
        return self.weight.to(wide) + self.left.to(wide) @ self.core @ self.right.to(wide)

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        return lora_tensors(self.core @ self.right.to(self.core.dtype), self.left)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.right)
        low = F.linear(low, self.core.to(low.dtype))
        y = F.linear(x, self.weight, self.bias) + F.linear(low, self.left)
        if self.gradient is None or not self.training:
            return y
        watched: Tensor = Watched.apply(y, x, self.gradient)
        return watched


class Watched(torch.autograd.Function):
    """y as it is; backward adds dy^T x, the gradient of the matrix that y = x W^T came from, to `total`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        [x] = ctx.saved_tensors
        total: Tensor = ctx.total
        rows = grad.reshape(-1, grad.shape[-1]).to(total.dtype)
        total.addmm_(rows.T, x.detach().reshape(-1, x.shape[-1]).to(total.dtype))
        return grad, None, None
