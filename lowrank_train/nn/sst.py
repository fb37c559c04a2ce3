"""Sparse spectral training: all singular values learn at each step, singular vectors a sample at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_train.kernels.unit_columns import unit_columns_
from lowrank_train.nn.events import Event, Moments, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept
from lowrank_train.nn.spectral import ThroughDense, ThroughFactors, composed


@dataclass
class SST(Weights):
    """W = U diag(sigma) V^T with all k = min(m, n) components and no dense W (Zhao et al., arXiv 2405.15481).

    For an iteration of `iteration_steps` updates, `rank` columns of U and V learn beside all of sigma; they are drawn
    without replacement, with p_i = (1/k + sigma_i / sum of sigma) / 2. After each update sigma <- max(sigma, 0) and
    the columns get unit length. A round of `iterations_per_round` iterations ends with an SVD of the product.
    """

    rank: int = 128
    iteration_steps: int = 200  # updates that one sample of columns lasts
    iterations_per_round: int | None = None  # null: short side / rank, so that a column is drawn about once a round
    enhanced_gradient: bool = True  # false: the gradients of U and V as they are, sigma_i times these

    def __post_init__(self) -> None:
        for name in ("rank", "iteration_steps", "iterations_per_round"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"strategy.weights.{name} is {value}; it must be at least 1")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return SSTLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        def begin_iteration(layer: SSTLinear, number: int, moments: Moments) -> None:
            if number % layer.iterations_per_round == 0:
                layer.fold_(number)
                moments.forget(layer.sigma)
            else:
                layer.sample_(number)
            moments.forget(layer.U_active)
            moments.forget(layer.V_active)

        constrain = each(SSTLinear, lambda layer, number, moments: layer.constrain_())
        begin = each(SSTLinear, begin_iteration)

        return [
            Event("unit columns", constrain, first=1, every=1, quiet=True),
            Event("new sample of columns", begin, first=self.iteration_steps, every=self.iteration_steps),
        ]


class SSTLinear(ReparamLinear):
    """y = ((x V) * sigma) U^T + bias, with U (out_features, k), V (in_features, k), sigma (k), k the short side.

    Columns that learn lie apart from those that do not: `U_active` and `V_active` have `rank` of them, `U_frozen` and
    `V_frozen` the others; `order` (k) says which component of sigma each of the k columns belongs to.
    """

    choice = SST
    weights: SST

    def __init__(self, linear: nn.Linear, weights: SST, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        like, rank = linear.weight.detach(), weights.rank
        k = min(like.shape)
        self.iterations_per_round = weights.iterations_per_round or -(-k // rank)
        self.U_active = nn.Parameter(like.new_empty(self.out_features, rank))
        self.V_active = nn.Parameter(like.new_empty(self.in_features, rank))
        self.sigma = nn.Parameter(like.new_empty(k))
        self.U_frozen = kept(like.new_empty(self.out_features, k - rank))
        self.V_frozen = kept(like.new_empty(self.in_features, k - rank))
        self.order: Tensor
        self.register_buffer("order", torch.arange(k, device=like.device))
        if not like.is_meta:
            self._decompose_(like)
            self.sample_(0)

    @property
    def U(self) -> Tensor:
        """All left vectors, (out_features, k), the i-th that of sigma_i."""
        return torch.cat([self.U_active, self.U_frozen], dim=1)[:, self.order.argsort()]

    @property
    def V(self) -> Tensor:
        """All right vectors, (in_features, k), the i-th that of sigma_i."""
        return torch.cat([self.V_active, self.V_frozen], dim=1)[:, self.order.argsort()]

    def dense_weight(self) -> Tensor:
        wide = torch.promote_types(self.sigma.dtype, torch.float32)
        return composed(*(one.to(wide) for one in self._columns()))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        rows = x.reshape(-1, self.in_features)
        # Through W or the factors: without gradients m n (T + k) or T k (m + n) multiplications, which is the same at
        # T = the long side. With gradients about the same at twice that, and a W takes less room than P and Q there.
        passes = 2 if torch.is_grad_enabled() else 1
        way = ThroughDense if len(rows) > passes * max(self.in_features, self.out_features) else ThroughFactors
        tensors = (one.to(dtype) for one in (rows, *self._columns()))
        out: Tensor = way.apply(self.weights.enhanced_gradient, *tensors).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(dtype)

    @torch.no_grad()
    def constrain_(self) -> None:
        """sigma <- max(sigma, 0), and columns that learn are divided by their lengths."""
        self.sigma.clamp_(min=0)
        for columns in (self.U_active, self.V_active):
            unit_columns_(columns)

    @torch.no_grad()
    def sample_(self, number: int) -> None:
        """Let another sample of columns learn; nothing but places changes."""
        drawn = draw(self.sigma, self.weights.rank, self.origin.generator(f"columns {number}"))
        chosen = torch.zeros_like(self.order, dtype=torch.bool)
        chosen[drawn.to(chosen.device)] = True
        left, right = self.U, self.V
        order = torch.argsort((~chosen).byte(), stable=True)  # those that learn first, either ascending
        self._place_(left, right, order)

    @torch.no_grad()
    def fold_(self, number: int = 1) -> None:
        """U, sigma, V <- SVD of dense_weight(), and another sample learns."""
        self._decompose_(self.dense_weight())
        self.sample_(number)

    def renewed(self) -> Sequence[nn.Parameter]:
        return self.U_active, self.V_active, self.sigma

    @torch.no_grad()
    def _decompose_(self, weight: Tensor) -> None:
        """The entry of largest magnitude of each left vector is positive: signs do not depend on the machine."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        left, sigma, right = torch.linalg.svd(wide, full_matrices=False)
        signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
        self.sigma.copy_(sigma)
        self._place_(left * signs, right.T * signs, torch.arange(len(sigma), device=wide.device))

    def _place_(self, left: Tensor, right: Tensor, order: Tensor) -> None:
        active, frozen = order.split([self.weights.rank, len(order) - self.weights.rank])
        self.U_active.copy_(left[:, active])
        self.V_active.copy_(right[:, active])
        self.U_frozen.copy_(left[:, frozen])
        self.V_frozen.copy_(right[:, frozen])
        self.order.copy_(order)

    def _columns(self) -> tuple[Tensor, ...]:
        """Columns that learn and columns that do not, and sigma of either, as the products take them."""
        rank = self.weights.rank
        sigma = self.sigma[self.order[:rank]], self.sigma[self.order[rank:]]
        return self.U_active, self.V_active, self.U_frozen, self.V_frozen, *sigma


def draw(sigma: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """`rank` different components, (rank) on the CPU, each draw with p_i = (1/k + sigma_i / sum of sigma) / 2."""
    return torch.multinomial(probabilities(sigma), rank, generator=generator)


def probabilities(sigma: Tensor) -> Tensor:
    """p in float64 on the CPU; uniform where all of sigma is 0."""
    values = sigma.detach().to("cpu", torch.float64)
    uniform = torch.full_like(values, 1 / len(values))
    total = float(values.sum())
    return (uniform + values / total) / 2 if total > 0 else uniform
