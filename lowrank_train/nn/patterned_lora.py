"""LoRA whose factors follow a pattern: blocks along the diagonal (MELoRA), or several masked copies (CapaBoost)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.as_lora import lora_options, lora_tensors
from lowrank_train.nn.between import RandomStart
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear, uniform


@dataclass
class MELoRA(RandomStart):
    """W = W0 + s diag(B_1 A_1 ... B_n A_n), s = alpha / rank: n mini LoRAs of this rank, each from its part of the
    inputs to its part of the outputs, so that the update has rank n * rank with LoRA's numbers of one rank
    (Ren et al., arXiv 2402.17263)."""

    minis: int = 4  # n; must divide both sides

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minis < 1:
            raise ValueError(f"strategy.weights.minis is {self.minis}; it must be at least 1")

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[0] % self.minis or shape[1] % self.minis:
            return (
                f"strategy.weights.minis is {self.minis}, which does not divide both sides of {shape[0]} x {shape[1]}"
            )
        if self.rank > min(shape) // self.minis:
            return (
                f"strategy.weights.rank is {self.rank}, above the short side of the {self.minis} blocks of "
                f"{shape[0]} x {shape[1]}"
            )
        return None

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return MELoRALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        super().as_peft()
        return lora_options(self.minis * self.rank, self.scale, self.dropout)


@dataclass
class CapaBoost(RandomStart):
    """W = W0 + s sum over j of (B * M_j) (A * N_j), entry by entry: `copies` of one LoRA under masks of their own, for
    `copies` times the rank at its numbers (Song et al., arXiv 2407.01320). Each mask keeps exactly the share `density`
    of the entries, and never changes."""

    copies: int = 2
    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 1:
            raise ValueError(f"strategy.weights.copies is {self.copies}; it must be at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"strategy.weights.density is {self.density}; it must lie in (0, 1]")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return CapaBoostLinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        super().as_peft()
        return lora_options(self.copies * self.rank, self.scale, self.dropout)


class MELoRALinear(LoRALinear):
    """LoRA whose `lora_A` (rank, in) holds A_1 ... A_n side by side, `lora_B` (out, rank) B_1 ... B_n in a column."""

    choice = MELoRA
    weights: MELoRA

    def blocks(self) -> tuple[Tensor, Tensor]:
        """A as (n, rank, in / n), B as (n, out / n, rank)."""
        first, second = self.factors
        minis = self.weights.minis
        return first.unflatten(1, (minis, -1)).transpose(0, 1), second.unflatten(0, (minis, -1))

    def update_of_weight(self) -> Tensor:
        first, second = self.blocks()
        wide = torch.promote_types(first.dtype, torch.float32)
        return self.weights.scale * torch.block_diag(*torch.bmm(second.to(wide), first.to(wide)))

    def forward(self, x: Tensor) -> Tensor:
        dense = F.linear(x, self._base(x.dtype), self.bias)
        if self.lora_A is None:
            return dense
        first, second = self.blocks()
        parts = F.dropout(x, self.weights.dropout, self.training).unflatten(-1, (self.weights.minis, -1))
        low = torch.bmm(parts.flatten(0, -3).transpose(0, 1), first.transpose(1, 2))  # (n, tokens, rank)
        update = torch.bmm(low, second.transpose(1, 2)).transpose(0, 1).reshape(dense.shape)
        return dense + self.weights.scale * update

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        first, second = self.blocks()
        return lora_tensors(torch.block_diag(*first), torch.block_diag(*second))

    def _random(self, number: int) -> tuple[Tensor, Tensor]:
        """Each A_i as LoRA's A of in / n inputs."""
        if self.weights.init == "gaussian":
            return super()._random(number)
        generator = self.origin.generator(f"lora_A {number}")
        bound = (self.in_features / self.weights.minis) ** -0.5
        return uniform((self.weights.rank, self.in_features), bound, self.weight, generator), self._zero()


class CapaBoostLinear(LoRALinear):
    """LoRA with `mask_A` (copies, rank, in) and `mask_B` (copies, out, rank)."""

    choice = CapaBoost
    weights: CapaBoost

    def begin_(self) -> None:
        super().begin_()
        self.mask_A: Tensor
        self.mask_B: Tensor
        self.register_buffer("mask_A", self._masks("A", (self.weights.rank, self.in_features)))
        self.register_buffer("mask_B", self._masks("B", (self.out_features, self.weights.rank)))

    def masked(self) -> tuple[Tensor, Tensor]:
        """All A * N_j, (copies rank, in), and all B * M_j, (out, copies rank)."""
        first, second = self.factors
        return (first * self.mask_A).flatten(0, 1), (second * self.mask_B).transpose(0, 1).flatten(1)

    def update_of_weight(self) -> Tensor:
        first, second = self.masked()
        wide = torch.promote_types(first.dtype, torch.float32)
        return self.weights.scale * (second.to(wide) @ first.to(wide))

    def forward(self, x: Tensor) -> Tensor:
        dense = F.linear(x, self._base(x.dtype), self.bias)
        if self.lora_A is None:
            return dense
        first, second = self.masked()
        low = F.linear(F.dropout(x, self.weights.dropout, self.training), first)
        return dense + self.weights.scale * F.linear(low, second)

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        return lora_tensors(*self.masked())

    def _masks(self, factor: str, shape: tuple[int, int]) -> Tensor:
        """`copies` masks of a factor, with int(density * entries) ones each."""
        copies, entries, device = self.weights.copies, shape[0] * shape[1], self.weight.device
        if self.weight.is_meta:
            return torch.empty(copies, *shape, dtype=torch.bool, device=device)
        masks = torch.zeros(copies, entries, dtype=torch.bool, device="cpu")
        generator = self.origin.generator(f"masks of {factor}")
        for mask in masks:
            mask[torch.randperm(entries, generator=generator, device="cpu")[: int(self.weights.density * entries)]] = (
                True
            )
        return masks.view(copies, *shape).to(device)
