"""FedPara and LoHa: a matrix, or the update of one, as the entrywise product of two products of thin factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept, normal, uniform
from lowrank_train.nn.rounding import add_


@dataclass
class FedPara(Weights):
    """W = (B1 A1) * (B2 A2), entry by entry, of rank up to rank^2 (Hyeon-Woo et al., arXiv 2108.06098).

    All four factors are trained from random values; the matrix that the layer is built from gives only the spread of
    its entries. rank >= sqrt(short side) lets W have full rank.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")

    def misfit(self, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if 2 * self.rank * (rows + columns) > rows * columns:
            most = rows * columns // (2 * (rows + columns))
            return (
                f"strategy.weights.rank is {self.rank}; the factors of {rows} x {columns} then hold more numbers than "
                f"the matrix itself, which is so above {most}"
            )
        return None

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return FedParaLinear(linear, self, origin)


@dataclass
class LoHa(FedPara):
    """W = W0 + (alpha / rank) (B1 A1) * (B2 A2), W0 kept: FedPara's product as an adapter, as LyCORIS and peft have it.

    It starts at W0: B2 = 0, and the other three random. As LoRA, it can be merged into W0 in rounds.
    """

    alpha: float = 64.0
    rounding: Rounding = "nearest"  # how a fold is rounded to a W0 in bfloat16; compensated costs 2 more bytes a weight

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LoHaLinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return "LOHA", {"r": self.rank, "alpha": self.alpha}


class FedParaLinear(ReparamLinear):
    """y = x W^T + bias, with A1 and A2 (rank, in_features), B1 and B2 (out_features, rank).

    The published start, He-normal for each factor, makes W far too small, since the variance of a product of
    independent numbers is the product of their variances: Var(W) = rank^2 sigma^8 for factors of variance sigma^2.
    Here sigma = (std(W0) / rank)^(1/4), so that W begins with the spread of the matrix it takes the place of.
    """

    choice = FedPara
    weights: FedPara

    def __init__(self, linear: nn.Linear, weights: FedPara, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.B1: nn.Parameter
        self.A1: nn.Parameter
        self.B2: nn.Parameter
        self.A2: nn.Parameter
        self._make_factors(linear.weight.detach())

    def _make_factors(self, weight: Tensor) -> None:
        std = 1.0 if weight.is_meta else weight.float().std().item()
        sigma, rank = (std / self.weights.rank) ** 0.25, self.weights.rank
        for name, shape in (
            ("A1", (rank, self.in_features)),
            ("B1", (self.out_features, rank)),
            ("A2", (rank, self.in_features)),
            ("B2", (self.out_features, rank)),
        ):
            setattr(self, name, nn.Parameter(normal(shape, sigma, weight, self.origin.generator(f"{name} 0"))))

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """B1, A1, B2, A2."""
        return self.B1, self.A1, self.B2, self.A2

    def product(self) -> Tensor:
        """(B1 A1) * (B2 A2) in at least float32."""
        wide = torch.promote_types(self.B1.dtype, torch.float32)
        b1, a1, b2, a2 = (factor.to(wide) for factor in self.factors)
        return (b1 @ a1) * (b2 @ a2)

    def dense_weight(self) -> Tensor:
        return self.product()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = HadamardLinear.apply(x, None, 1.0, *self.factors)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LoHaLinear(FedParaLinear):
    """y = x (W0 + s (B1 A1) * (B2 A2))^T + bias, s = alpha / rank; `weight` is W0.

    As peft starts them: A1, A2 uniform in +-1/sqrt(in_features), B1 in +-1/sqrt(rank), B2 = 0. With
    rounding=compensated, `residue` holds what a bfloat16 `weight` cannot of the folded sum.
    """

    choice = LoHa
    weights: LoHa

    def _make_factors(self, weight: Tensor) -> None:
        self.weight = kept(weight)
        self.residue: Tensor | None
        compensated = self.weights.rounding == "compensated" and weight.dtype.itemsize < 4
        self.register_buffer("residue", torch.zeros_like(weight) if compensated else None)
        for name, value in zip(("B1", "A1", "B2", "A2"), self._initial(0), strict=True):
            setattr(self, name, nn.Parameter(value))

    @property
    def scale(self) -> float:
        """s."""
        return self.weights.alpha / self.weights.rank

    def _initial(self, number: int) -> tuple[Tensor, ...]:
        """B1, A1, B2, A2 at the start of round `number`."""
        rank, rows, columns, like = self.weights.rank, self.out_features, self.in_features, self.weight
        draw = self.origin.generator
        return (
            uniform((rows, rank), 1 / math.sqrt(rank), like, draw(f"B1 {number}")),
            uniform((rank, columns), 1 / math.sqrt(columns), like, draw(f"A1 {number}")),
            like.new_zeros(rows, rank),
            uniform((rank, columns), 1 / math.sqrt(columns), like, draw(f"A2 {number}")),
        )

    def dense_weight(self) -> Tensor:
        update = self.scale * self.product()
        weight = self.weight.to(update.dtype)
        return (weight if self.residue is None else weight + self.residue) + update

    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return {f"{name}.default": factor.detach() for name, factor in zip(names, self.factors, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = HadamardLinear.apply(x, self.weight, self.scale, *self.factors)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def fold_(self, number: int = 1) -> None:
        """W0 <- W0 + s (B1 A1) * (B2 A2); B1, A1, A2 anew, B2 = 0."""
        add_(self.weight, self.scale * self.product(), self.weights.rounding, self.residue, self.origin, number)
        for factor, value in zip(self.factors, self._initial(number), strict=True):
            factor.copy_(value)

    def renewed(self) -> Sequence[nn.Parameter]:
        return self.factors


class HadamardLinear(torch.autograd.Function):
    """x, W0 or None, s, B1, A1, B2, A2 -> x (W0 + s (B1 A1) * (B2 A2))^T.

    Backward keeps x and the factors alone: the three matrices of the size of W are computed again, one after another.
    With G = gy^T x:  gB1 = s (G * (B2 A2)) A1^T,  gA1 = s B1^T (G * (B2 A2)),  and the same with 1 and 2 exchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, scale: float, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *factors)
        ctx.scale = scale
        return F.linear(x, _whole(weight, scale, *factors).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        (gy,) = grads
        gx = (gy @ _whole(weight, ctx.scale, *factors).to(gy.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        b1, a1, b2, a2 = factors
        whole = ctx.scale * (gy.reshape(-1, gy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(gy.dtype)).to(b1.dtype)
        inner = whole * (b2 @ a2)
        gb1, ga1 = inner @ a1.T, b1.T @ inner
        inner = whole * (b1 @ a1)
        return gx, None, None, gb1, ga1, inner @ a2.T, b2.T @ inner


def _whole(weight: Tensor | None, scale: float, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    product = scale * (b1 @ a1) * (b2 @ a2)
    return product if weight is None else weight + product
