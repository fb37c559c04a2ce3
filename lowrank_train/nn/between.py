"""LoRA with something small between its factors: MoSLoRA's mixer, SoRA's gate."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.as_lora import lora_tensors
from lowrank_train.nn.events import Event, each
from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear, normal, uniform


@dataclass
class RandomStart(LoRA):
    """LoRA's options without the starts that take B A out of W0, for products that are not B A."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init in ("pissa", "olora"):
            kind = type(self).__name__
            raise ValueError(f"strategy.weights.init is {self.init}, but the update of {kind} is not B A; use kaiming")


@dataclass
class MoSLoRA(RandomStart):
    """W = W0 + s B M A with a trained mixer M (rank, rank) that begins uniform in +-1/sqrt(rank) (arXiv 2406.11909)."""

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return MoSLoRALinear(linear, self, origin)


@dataclass
class SoRA(RandomStart):
    """W = W0 + s B diag(g) A, g from N(0, 1); after every update g <- sign(g) max(|g| - threshold, 0) (2311.11696).

    The published code also zeroes what is left below the threshold, so that values up to twice the threshold vanish.
    """

    threshold: float = 1e-4  # lambda; not times the learning rate

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0:
            raise ValueError(f"strategy.weights.threshold is {self.threshold}; it must be at least 0")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return SoRALinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        shrink = each(SoRALinear, lambda layer, number, moments: layer.shrink_())
        first = self.warm_start_steps + 1
        return [*super().events(), Event("soft threshold", shrink, first, every=1, quiet=True)]


class BetweenLinear(LoRALinear):
    """y = x W0^T + s between(drop(x) A^T) B^T + bias, where `between` is linear."""

    @abstractmethod
    def between(self, low: Tensor) -> Tensor:
        """(..., rank) -> (..., rank), in the dtype of `low`."""

    def update_of_weight(self) -> Tensor:
        first, second = self.factors
        wide = torch.promote_types(first.dtype, torch.float32)
        return self.weights.scale * (second.to(wide) @ self.between(first.T.to(wide)).T)

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        first, second = self.factors
        return lora_tensors(self.between(first.T).T, second)


class MoSLoRALinear(BetweenLinear):
    """LoRA with `mixer` M (rank, rank); a fold keeps M."""

    choice = MoSLoRA
    weights: MoSLoRA

    def begin_(self) -> None:
        super().begin_()
        rank, generator = self.weights.rank, self.origin.generator("mixer")
        self.mixer = nn.Parameter(uniform((rank, rank), 1 / math.sqrt(rank), self.weight, generator))

    def between(self, low: Tensor) -> Tensor:
        return F.linear(low, self.mixer.to(low.dtype))


class SoRALinear(BetweenLinear):
    """LoRA with `gate` g (rank), at least float32: in bfloat16 the threshold would be lost in rounding."""

    choice = SoRA
    weights: SoRA

    def begin_(self) -> None:
        super().begin_()
        self.gate = nn.Parameter(self._drawn(0))

    def between(self, low: Tensor) -> Tensor:
        return low * self.gate.to(low.dtype)

    @torch.no_grad()
    def shrink_(self) -> None:
        """g <- sign(g) max(|g| - threshold, 0)."""
        self.gate.copy_(F.softshrink(self.gate, self.weights.threshold))

    def _renew_factors(self, number: int) -> None:
        super()._renew_factors(number)
        self.gate.copy_(self._drawn(number))  # a gate of 0 with a B of 0 would stay closed

    def renewed(self) -> Sequence[nn.Parameter]:
        return (*super().renewed(), self.gate) if self.lora_A is not None else ()

    def _drawn(self, number: int) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        like = torch.empty((), dtype=wide, device=self.weight.device)
        return normal((self.weights.rank,), 1.0, like, self.origin.generator(f"gate {number}"))
