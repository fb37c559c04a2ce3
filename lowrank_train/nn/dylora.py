"""DyLoRA: a LoRA trained at a rank drawn anew for every update, so that every smaller rank of it can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.nn.as_lora import lora_options, lora_tensors
from lowrank_train.nn.between import RandomStart
from lowrank_train.nn.events import Event, each
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear


@dataclass
class DyLoRA(RandomStart):
    """In training W = W0 + (alpha / b) B[:, :b] A[:b], b uniform in least_rank ... rank, the same for all layers and
    another for each update (Valipour et al., arXiv 2210.07558). Evaluation and export have b = used_rank."""

    least_rank: int = 1
    used_rank: int | None = None  # of evaluation and export; null: rank
    frozen: bool = False  # true: only row b of A and column b of B learn from an update

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.least_rank <= self.rank:
            raise ValueError(
                f"strategy.weights.least_rank is {self.least_rank}; it must lie in [1, strategy.weights.rank]"
            )
        if self.used_rank is not None and not 1 <= self.used_rank <= self.rank:
            raise ValueError(
                f"strategy.weights.used_rank is {self.used_rank}; it must lie in [1, strategy.weights.rank]"
            )
        if self.rslora:
            raise ValueError("strategy.weights.rslora: DyLoRA's factor is alpha / b; use rslora=false")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return DyLoRALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        super().as_peft()
        used = self.used_rank or self.rank
        return lora_options(used, self.alpha / used, self.dropout)

    def events(self) -> Sequence[Event]:
        draw = each(DyLoRALinear, lambda layer, number, moments: layer.draw_(number))
        first = self.warm_start_steps + 1
        return [*super().events(), Event("new rank", draw, first, every=1, quiet=True)]


class DyLoRALinear(LoRALinear):
    """LoRA with `width`, the b that the next forward pass in training has."""

    choice = DyLoRA
    weights: DyLoRA

    def begin_(self) -> None:
        super().begin_()
        self.width: Tensor
        self._width = self._drawn(0)  # `width`, known without asking the device
        self.register_buffer("width", torch.full((), self._width, dtype=torch.int64, device=self.weight.device))

    def draw_(self, number: int) -> None:
        """Another b."""
        self._width = self._drawn(number)
        self.width.fill_(self._width)

    def _drawn(self, number: int) -> int:
        generator = torch.Generator().manual_seed(seed_from_name(self.origin.seed, f"DyLoRA's rank {number}"))
        return int(torch.randint(self.weights.least_rank, self.weights.rank + 1, (), generator=generator, device="cpu"))

    def update_of_weight(self) -> Tensor:
        """That of evaluation."""
        first, second = self.factors
        used = self.weights.used_rank or self.weights.rank
        wide = torch.promote_types(first.dtype, torch.float32)
        return self.weights.alpha / used * (second[:, :used].to(wide) @ first[:used].to(wide))

    def forward(self, x: Tensor) -> Tensor:
        dense = F.linear(x, self._base(x.dtype), self.bias)
        if self.lora_A is None:
            return dense
        width = self._width if self.training else self.weights.used_rank or self.weights.rank
        first, second = self.factors[0][:width], self.factors[1][:, :width]
        if self.weights.frozen and self.training:
            last = width - 1
            first = torch.cat([first[:last].detach(), first[last:]])
            second = torch.cat([second[:, :last].detach(), second[:, last:]], dim=1)
        low = F.linear(F.dropout(x, self.weights.dropout, self.training), first)
        return dense + self.weights.alpha / width * F.linear(low, second)

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        first, second = self.factors
        used = self.weights.used_rank or self.weights.rank
        return lora_tensors(first[:used], second[:, :used])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.lora_A is not None and not self.width.is_meta:
            self._width = int(self.width.item())
