"""LoRA-GGPO: LoRA trained under noise on its weights, row by row as large as weights and gradients are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.kernels.philox import random_16_bits
from lowrank_train.nn.events import Event, each
from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear, sum_over_ranks_

BLOCK_NUMBERS = 2**22  # of noise that exist at a time: 16 MiB in float32, and a few times that in random bits


@dataclass
class LoRAGGPO(LoRA):
    """In training W = W0 + s B A + E, each row E_i from N(0, (sigma |W_i| + beta |G_i|)^2 / out), other noise for each
    update (Chang et al., arXiv 2502.14538v1). Evaluation and export have no noise.

    |W_i| are the norms of the rows of W0 + s B A, |G_i| those of G = s (B gA + gB A) with the gradients gA and gB of
    the update before; the formula as the public implementation in sd-scripts has it, whose defaults these are too.
    """

    sigma: float = 0.03
    beta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma", "beta"):
            if getattr(self, name) < 0:
                raise ValueError(f"strategy.weights.{name} is {getattr(self, name)}; it must be at least 0")
        if not self.train_a:
            raise ValueError("strategy.weights.train_a is false, but LoRA-GGPO needs the gradients of both factors")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LoRAGGPOLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        renew = each(LoRAGGPOLinear, lambda layer, number, moments: layer.renew_noise_(number))
        first = self.warm_start_steps + 1
        return [*super().events(), Event("new noise", renew, first, every=1, quiet=True)]


class LoRAGGPOLinear(LoRALinear):
    """LoRA with `deviations` (out), those of the noise of the next update, and its number, `noise`.

    `seen_A` and `seen_B` add up gA and gB while an update is made, also where each gradient is freed at once.
    """

    choice = LoRAGGPO
    weights: LoRAGGPO

    def begin_(self) -> None:
        super().begin_()
        self.deviations: Tensor
        self.noise: Tensor
        self.seen_A: Tensor
        self.seen_B: Tensor
        self._noise = 0  # `noise`, known without asking the device
        device, wide = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("noise", torch.zeros((), dtype=torch.int64, device=device))
        for name, factor in zip(("seen_A", "seen_B"), self.factors, strict=True):
            seen = torch.zeros(factor.shape, dtype=wide, device=device)
            self.register_buffer(name, seen, persistent=False)  # 0 whenever a checkpoint is taken
        self.register_buffer("deviations", self._deviations())

    @torch.no_grad()
    def renew_noise_(self, number: int) -> None:
        """Noise for the update after update `number`, which has been seen."""
        sum_over_ranks_(self.seen_A)
        sum_over_ranks_(self.seen_B)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.seen_A.div_(torch.distributed.get_world_size())
            self.seen_B.div_(torch.distributed.get_world_size())
        self.deviations.copy_(self._deviations())
        self.seen_A.zero_()
        self.seen_B.zero_()
        self.noise.fill_(number)
        self._noise = number

    @torch.no_grad()
    def _deviations(self) -> Tensor:
        """(sigma |W_i| + beta |G_i|) / sqrt(out), from products of rank columns alone."""
        wide, scale = self.seen_A.dtype, self.weights.scale
        base = self.kept_weight().to(wide)
        a, b = (factor.to(wide) for factor in self.factors)
        of_a = a @ a.T
        weights = base.square().sum(1) + scale * (b * (2 * F.linear(base, a) + scale * (b @ of_a))).sum(1)
        gradients = (b * (b @ (self.seen_A @ self.seen_A.T) + 2 * self.seen_B @ (a @ self.seen_A.T))).sum(1)
        gradients += (self.seen_B * (self.seen_B @ of_a)).sum(1)
        norms = self.weights.sigma * weights.clamp_min(0).sqrt()
        return (norms + self.weights.beta * scale * gradients.clamp_min(0).sqrt()) / math.sqrt(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.lora_A is None or not self.training:
            return super().forward(x)
        first, second = Seen.apply(*self.factors, self.seen_A, self.seen_B)
        low = F.linear(F.dropout(x, self.weights.dropout, self.training), first)
        dense = F.linear(x, self._base(x.dtype), self.bias) + self.weights.scale * F.linear(low, second)
        seed = seed_from_name(self.origin.seed, f"{self.origin.name}/noise {self._noise}")
        noisy: Tensor = dense + Perturbation.apply(x, self.deviations, seed)
        return noisy

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.lora_A is not None and not self.noise.is_meta:
            self._noise = int(self.noise.item())


class Seen(torch.autograd.Function):
    """A and B as they are; backward adds their gradients to two totals."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, *totals: Tensor) -> tuple[Tensor, Tensor]:
        ctx.totals = totals
        return first.view_as(first), second.view_as(second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for total, grad in zip(ctx.totals, grads, strict=True):
            total.add_(grad)
        return *grads, None, None


class Perturbation(torch.autograd.Function):
    """x E^T; E is made anew in backward, and is never there whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, seed: int) -> Tensor:
        ctx.deviations, ctx.seed, ctx.like = deviations, seed, x.new_empty(0)
        ctx.columns = x.shape[-1]
        return torch.cat([F.linear(x, rows.to(x.dtype)) for _, rows in noise(deviations, x.shape[-1], seed)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        found = grad.new_zeros(*grad.shape[:-1], ctx.columns)
        for place, rows in noise(ctx.deviations, ctx.columns, ctx.seed):
            found += grad[..., place] @ rows.to(grad.dtype)
        return found.to(ctx.like.dtype), None, None


def noise(deviations: Tensor, columns: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, these rows of E), a block after the other; the normal quantiles of 16 random bits a number."""
    step = max(1, BLOCK_NUMBERS // columns)
    for start in range(0, len(deviations), step):
        place = slice(start, min(start + step, len(deviations)))
        bits = random_16_bits((seed + start) & (2**63 - 1), place.stop - start, columns, deviations.device)
        quantiles = torch.erfinv((bits.to(deviations.dtype) + 0.5) / 2**15 - 1) * math.sqrt(2)
        yield place, deviations[place, None] * quantiles
