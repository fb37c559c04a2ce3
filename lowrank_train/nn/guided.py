"""Self-guided training: a dense path that begins as the product of the factors and fades out as they learn."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.events import Event, Moments, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights


@dataclass
class SelfGuided(Weights):
    """Factors f that may be led by a dense matrix W_g for a while (Wei et al., arXiv 2407.09835).

    o = alpha W_g x + (1 - alpha) f(x), alpha = (1 + cos(pi t / guided_steps)) / 2 for update t, counted from 0;
    W_g begins as the product of the factors, is trained like them, and is gone once alpha is 0.
    """

    guided_steps: int = 0  # updates until W_g is gone; 0: there is none. 0.3 to 0.45 of a run in arXiv 2407.09835

    def __post_init__(self) -> None:
        if self.guided_steps < 0:
            raise ValueError(f"strategy.weights.guided_steps is {self.guided_steps}; it must be at least 0")

    def alpha_at(self, step: int) -> float:
        """The share of the dense path in update `step`, counted from 0."""
        if step >= self.guided_steps:
            return 0.0
        return (1 + math.cos(math.pi * step / self.guided_steps)) / 2

    def events(self) -> Sequence[Event]:
        if not self.guided_steps:
            return ()

        def fade(layer: GuidedLinear, number: int, moments: Moments) -> None:
            if layer.alpha is not None:
                layer.alpha.fill_(self.alpha_at(number))

        end = each(GuidedLinear, lambda layer, number, moments: layer.end_guidance_())  # type: ignore[type-abstract]
        return [
            Event("share of the dense path", each(GuidedLinear, fade), first=1, every=1, quiet=True),  # type: ignore[type-abstract]
            Event("end of self-guided training", end, first=self.guided_steps, restructures=True),
        ]


class GuidedLinear(ReparamLinear):
    """y = alpha x W_g^T + (1 - alpha) f(x) + bias; `guide` is W_g, (out_features, in_features), `alpha` a number.

    Both are None from the end of the guidance on, and always without it. A class of factors f says what `product` and
    `through_factors` are, and calls `begin_guidance_` once it has its factors.
    """

    weights: SelfGuided

    def __init__(self, linear: nn.Linear, weights: SelfGuided, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.guide: nn.Parameter | None
        self.register_parameter("guide", None)
        self.alpha: Tensor | None
        self.register_buffer("alpha", None)

    @abstractmethod
    def product(self) -> Tensor:
        """The matrix that the factors stand for, (out_features, in_features), in at least float32. Differentiable."""

    @abstractmethod
    def through_factors(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x product()^T + bias, computed factor by factor."""

    @torch.no_grad()
    def begin_guidance_(self) -> None:
        """W_g <- the product of the factors, if there is a phase in which it is needed."""
        if not self.weights.guided_steps:
            return
        factor = next(param for param in self.parameters() if param.requires_grad)
        product = torch.empty(self.out_features, self.in_features, device="meta") if factor.is_meta else self.product()
        self.guide = nn.Parameter(product.to(factor.dtype))
        self.alpha = torch.ones((), dtype=torch.promote_types(factor.dtype, torch.float32), device=factor.device)

    def end_guidance_(self) -> None:
        """Go on with the factors alone."""
        self.guide = self.alpha = None

    def dense_weight(self) -> Tensor:
        if self.guide is None or self.alpha is None:
            return self.product()
        wide = torch.promote_types(self.guide.dtype, torch.float32)
        return self.alpha * self.guide.to(wide) + (1 - self.alpha) * self.product()

    def forward(self, x: Tensor) -> Tensor:
        if self.guide is None or self.alpha is None:
            return self.through_factors(x, self.bias)
        dense = self.alpha * F.linear(x, self.guide) + (1 - self.alpha) * self.through_factors(x, None)
        return dense if self.bias is None else dense + self.bias

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        if "guide" not in shapes:
            self.end_guidance_()
