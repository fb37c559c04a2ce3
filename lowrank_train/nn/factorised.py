"""Factorised layers trained from scratch, W = B A: how they begin decides the result, and decay is of the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.events import Event, Moments, each
from lowrank_train.nn.guided import GuidedLinear, SelfGuided
from lowrank_train.nn.reparam import Origin, ReparamLinear, normal, uniform

NAIVE_STD = 0.02  # of both factors in the baseline of the GaLore line: the product's std is 0.02^2 sqrt(rank)


@dataclass
class LowRank(SelfGuided):
    """W = B A, B (m, r), A (r, n), with no matrix beside them; the spectral start and the decay of the product are of
    Khodak et al., arXiv 2105.01029."""

    rank: int = 128
    # spectral: B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T of the matrix W0 that the layer would have had; variance: both
    # normal, so that an entry of the product varies as one of W0; zero_b: A uniform in +-1/sqrt(n), B = 0, the product
    # of LoRA without its W0, as published baselines have it; naive: both from N(0, 0.02^2), far too small
    init: Literal["spectral", "variance", "zero_b", "naive"] = "spectral"
    frobenius_decay: float = 0.0  # lambda of (lambda / 2) |B A|_F^2, decoupled; in place of optim.weight_decay

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")
        if self.frobenius_decay < 0:
            raise ValueError(f"strategy.weights.frobenius_decay is {self.frobenius_decay}; it must be at least 0")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LowRankLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        if not self.frobenius_decay:
            return super().events()

        def decay(layer: LowRankLinear, number: int, moments: Moments) -> None:
            layer.decay_(moments.lr(layer.A) * self.frobenius_decay, moments.lr(layer.B) * self.frobenius_decay)

        return [Event("Frobenius decay", each(LowRankLinear, decay), first=1, every=1, quiet=True), *super().events()]


class LowRankLinear(GuidedLinear):
    """y = (x A^T) B^T + bias, with A (rank, in_features), B (out_features, rank)."""

    choice = LowRank
    weights: LowRank

    def __init__(self, linear: nn.Linear, weights: LowRank, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        second, first = self._initial(linear.weight.detach())
        self.A = nn.Parameter(first)
        self.B = nn.Parameter(second)
        self.begin_guidance_()

    def product(self) -> Tensor:
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.B.to(wide) @ self.A.to(wide)

    def through_factors(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B, bias)

    @torch.no_grad()
    def decay_(self, share_a: float, share_b: float) -> None:
        """A <- A - share_a B^T B A, B <- B - share_b B A A^T, both from the old factors.

        B A A^T and B^T B A are the gradients of |B A|_F^2 / 2. The products in between are rank x rank.
        """
        wide = torch.promote_types(self.A.dtype, torch.float32)
        first, second = self.A.to(wide), self.B.to(wide)
        of_first, of_second = (second.T @ second) @ first, second @ (first @ first.T)
        self.A.copy_(first - share_a * of_first)
        self.B.copy_(second - share_b * of_second)

    def _initial(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B and A."""
        rank, init = self.weights.rank, self.weights.init
        if init == "spectral" and not weight.is_meta:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
            root = values[:rank].sqrt()
            second, first = left[:, :rank] * root, root[:, None] * right[:rank]
            return second.to(weight.dtype).contiguous(), first.to(weight.dtype).contiguous()
        if init == "zero_b":
            drawn = uniform((rank, self.in_features), self.in_features**-0.5, weight, self.origin.generator("A"))
            return weight.new_zeros(self.out_features, rank), drawn
        std = NAIVE_STD
        if init == "variance" and not weight.is_meta:  # the product of two factors has std^2 sqrt(rank)
            std = float((weight.float().square().mean().sqrt() / rank**0.5).sqrt())
        return (
            normal((self.out_features, rank), std, weight, self.origin.generator("B")),
            normal((rank, self.in_features), std, weight, self.origin.generator("A")),
        )
