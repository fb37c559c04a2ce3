"""NOLA: the factors of a LoRA as combinations of random matrices that are never stored, only their coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_train.kernels.philox import random_16_bits
from lowrank_train.nn.as_lora import lora_options, lora_tensors
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept, uniform

BLOCK_NUMBERS = 2**20  # of the basis made at a time; which numbers a basis has depends on it


@dataclass
class NOLA(Weights):
    """W = W0 + s B A, s = alpha / rank, A = A0 + sum a_i E_i, B = sum b_j F_j with `bases` matrices E_i and F_j each,
    uniform in [-1, 1] / sqrt(bases); a and b, from 0, are trained alone, 2 bases numbers a matrix of whatever size
    (Koohpayegani et al., arXiv 2310.02556)."""

    rank: int = 8
    alpha: float = 16.0
    bases: int = 1000

    def __post_init__(self) -> None:
        for name in ("rank", "bases"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.weights.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return NOLALinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return lora_options(self.rank, self.scale)


class NOLALinear(ReparamLinear):
    """y = x W0^T + s x A^T B^T + bias, with `weight` W0, `start_A` A0 (rank, in), uniform in +-1/sqrt(in), and the
    coefficients `of_A` and `of_B` (bases), at least float32.

    The bases follow from the seed and are made anew, a block at a time, in forward and in backward.
    """

    choice = NOLA
    weights: NOLA

    def __init__(self, linear: nn.Linear, weights: NOLA, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.weight = kept(linear.weight.detach())
        shape = (weights.rank, self.in_features)
        self.start_A = kept(uniform(shape, self.in_features**-0.5, self.weight, origin.generator("start_A")))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.of_A = nn.Parameter(torch.zeros(weights.bases, dtype=wide, device=self.weight.device))
        self.of_B = nn.Parameter(torch.zeros_like(self.of_A))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) in at least float32."""
        rank, origin = self.weights.rank, self.origin
        first = combined(self.of_A, (rank, self.in_features), origin.seed_of("bases of A"))
        second = combined(self.of_B, (self.out_features, rank), origin.seed_of("bases of B"))
        return self.start_A.to(first.dtype) + first, second

    def dense_weight(self) -> Tensor:
        first, second = self.factors()
        return self.weight.to(first.dtype) + self.weights.scale * (second @ first)

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        return lora_tensors(*self.factors())

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.factors()
        low = F.linear(x, first.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.weights.scale * F.linear(low, second.to(x.dtype))


def combined(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """The sum of coefficient i times basis matrix i."""
    total: Tensor = Combination.apply(coefficients, shape[0] * shape[1], seed)
    return total.view(shape)


class Combination(torch.autograd.Function):
    """c -> sum c_i e_i over vectors e_i of `size` numbers that follow from the seed; backward g -> <g, e_i>."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, size: int, seed: int) -> Tensor:
        ctx.like, ctx.seed = coefficients.detach(), seed
        total = coefficients.new_zeros(size)
        for rows, basis in blocks_of_basis(ctx.like, size, seed):
            total.addmv_(basis.T, coefficients[rows])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        found = torch.empty_like(ctx.like)
        for rows, basis in blocks_of_basis(ctx.like, len(grad), ctx.seed):
            torch.mv(basis, grad, out=found[rows])
        return found, None, None


def blocks_of_basis(like: Tensor, size: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """(which vectors, those vectors (rows, size)) with the device and dtype of `like`, a block after the other."""
    count = len(like)
    step = max(1, BLOCK_NUMBERS // size)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        bits = random_16_bits((seed + start) & (2**63 - 1), rows.stop - start, size, like.device)
        yield rows, ((bits.to(like.dtype) + 0.5) / 2**15 - 1) / count**0.5
