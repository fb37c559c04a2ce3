"""LoRA-Pro: LoRA whose gradients are adjusted, so that the product moves as near as it can to the full gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear

DAMPING = 1e-8  # of the inverses of B^T B and A A^T, as published


@dataclass
class LoRAPro(LoRA):
    """LoRA with the gradients hA and hB in place of gA and gB, for which s (B hA + hB A) is the nearest such matrix to
    the full gradient, and which are themselves nearest to gA and gB (Wang et al., arXiv 2407.18242).

    hA = s^-2 (B^T B)^-1 gA + X A,  hB = s^-2 (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 - B X,
    where B^T B X + X A A^T = -s^-2 (B^T B)^-1 gA A^T.

    This is the paper's version for plain gradients, without the two dense moments a matrix that its Adam keeps. It is
    linear in the gradient, so that accumulation and several devices leave it exact.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train_a:
            raise ValueError("strategy.weights.train_a is false, but LoRA-Pro adjusts the gradients of both factors")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LoRAProLinear(linear, self, origin)


class LoRAProLinear(LoRALinear):
    """LoRA, with adjusted gradients."""

    choice = LoRAPro
    weights: LoRAPro

    def forward(self, x: Tensor) -> Tensor:
        dense = F.linear(x, self._base(x.dtype), self.bias)
        if self.lora_A is None:
            return dense
        first, second = Adjusted.apply(*self.factors, self.weights.scale)
        low = F.linear(F.dropout(x, self.weights.dropout, self.training), first)
        return dense + self.weights.scale * F.linear(low, second)


class Adjusted(torch.autograd.Function):
    """A and B as they are; in backward gA and gB become hA and hB."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second)
        ctx.scale = scale
        return first.view_as(first), second.view_as(second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first_grad: Tensor, second_grad: Tensor) -> tuple[Tensor, Tensor, None]:
        first, second = ctx.saved_tensors
        return *adjusted(first, second, first_grad, second_grad, ctx.scale), None


def adjusted(
    first: Tensor, second: Tensor, first_grad: Tensor, second_grad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """hA (rank, in) and hB (out, rank) of A, B, gA, gB.

    All inverses and the Sylvester equation go through the eigenvectors of the two symmetric rank x rank matrices.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    a, b, grad_a, grad_b = (item.to(wide) for item in (first, second, first_grad, second_grad))
    of_b, basis_b = torch.linalg.eigh(b.T @ b)
    of_a, basis_a = torch.linalg.eigh(a @ a.T)
    inverse_b = basis_b / (of_b.clamp_min(0) + DAMPING) @ basis_b.T
    inverse_a = basis_a / (of_a.clamp_min(0) + DAMPING) @ basis_a.T
    best_a = inverse_b @ grad_a / scale**2
    best_b = (grad_b - b @ (inverse_b @ (b.T @ grad_b))) @ inverse_a / scale**2
    turned = basis_b.T @ (best_a @ a.T) @ basis_a
    free = basis_b @ (turned / -(of_b[:, None] + of_a + DAMPING)) @ basis_a.T
    return (best_a + free @ a).to(first.dtype), (best_b - b @ free).to(second.dtype)
