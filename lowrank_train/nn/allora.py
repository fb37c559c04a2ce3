"""ALLoRA: LoRA without a scale, whose gradients are scaled row by row by how far the row has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_train.nn.as_lora import lora_options
from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.reparam import Origin, ReparamLinear


@dataclass
class ALLoRA(LoRA):
    """W = W0 + B A; the gradient g of row i of B A counts as g / sqrt(|(B A)_i| + 1 / eta^2), eta = alpha / rank, where
    A and B learn from it (Huang and Balestriero, arXiv 2410.09692).

    So eta, LoRA's scale, is how much faster a row learns that has not moved yet. What flows on to earlier layers is not
    scaled. It is linear in the gradient, so that accumulation and several devices leave it exact.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0:
            raise ValueError(f"strategy.weights.alpha is {self.alpha}; it must be above 0")

    @property
    def eta(self) -> float:
        """alpha / rank, or as rslora says."""
        return super().scale

    @property
    def scale(self) -> float:
        return 1.0

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return ALLoRALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        options = super().as_peft()[1]
        return lora_options(options["r"], 1.0, self.dropout)


class ALLoRALinear(LoRALinear):
    """y = x W0^T + drop(x) A^T B^T + bias, with scaled gradients of A and B."""

    choice = ALLoRA
    weights: ALLoRA

    def forward(self, x: Tensor) -> Tensor:
        dense = F.linear(x, self._base(x.dtype), self.bias)
        if self.lora_A is None:
            return dense
        update: Tensor = ScaledRows.apply(
            F.dropout(x, self.weights.dropout, self.training), *self.factors, self.weights.eta
        )
        return dense + update


class ScaledRows(torch.autograd.Function):
    """x A^T B^T; in backward A and B see the rows of the gradient of B A scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, eta: float) -> Tensor:
        ctx.save_for_backward(x, first, second)
        ctx.eta = eta
        return F.linear(F.linear(x, first), second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        saved = ctx.saved_tensors
        x, first, second = (tensor.to(grad.dtype) for tensor in saved)  # under autocast the product was in fewer bits
        of_x = grad @ second @ first if ctx.needs_input_grad[0] else None
        rows = (grad * row_factors(saved[1], saved[2], ctx.eta).to(grad.dtype)).flatten(0, -2)
        of_first = (rows @ second).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        of_second = rows.T @ F.linear(x, first).flatten(0, -2) if ctx.needs_input_grad[2] else None
        return of_x, of_first, of_second, None


def row_factors(first: Tensor, second: Tensor, eta: float) -> Tensor:
    """1 / sqrt(|(B A)_i| + 1 / eta^2) for every row i of B A, in at least float32.

    |(B A)_i|^2 = b_i (A A^T) b_i^T, so that B A is never there.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    a, b = first.to(wide), second.to(wide)
    squares = ((b @ (a @ a.T)) * b).sum(1).clamp_min(0)
    return (squares.sqrt() + eta**-2).rsqrt()
