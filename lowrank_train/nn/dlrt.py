"""DLRT: W = U S V^T trained factor by factor, with bases that follow the gradient and a rank that adapts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.events import Event, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept

LEAST_RANK = 2  # of the published truncation


@dataclass
class DLRT(Weights):
    """W = U S V^T, U and V orthonormal, by the basis-update and Galerkin integrator (arXiv 2205.13571).

    A step of the integrator takes three updates: K = U S is trained with W = K V^T, then L = V S^T with W = U L^T, both
    from the same W, then S within the spans of [U, K] and [V, L], after which the rank is cut back to `theta`.
    """

    rank: int = 128  # at the start, or for good where theta is null
    theta: float | None = 0.1  # the singular values cut off hold less than this share of |S|_F; null: a fixed rank

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"strategy.weights.theta is {self.theta}; it must lie in [0, 1)")
        if self.theta is not None and self.rank < LEAST_RANK:
            raise ValueError(f"strategy.weights.rank is {self.rank}; with a theta it must be at least {LEAST_RANK}")

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if self.theta is not None and 2 * self.rank > min(shape):
            return (
                f"strategy.weights.rank is {self.rank}, above half the short side of {shape[0]} x {shape[1]}: with a "
                "theta the bases are twice as wide for a while; strategy.weights.theta=null keeps the rank fixed"
            )
        return super().misfit(shape)

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return DLRTLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        end_k = each(DLRTLinear, lambda layer, number, moments: layer.end_k_())
        end_l = each(DLRTLinear, lambda layer, number, moments: layer.end_l_())
        end_s = each(DLRTLinear, lambda layer, number, moments: layer.end_s_())
        return [
            Event("K-step", end_k, 1, 3, quiet=True, restructures=True),
            Event("L-step", end_l, 2, 3, quiet=True, restructures=True),
            Event("S-step", end_s, 3, 3, quiet=True, restructures=True),
        ]


class DLRTLinear(ReparamLinear):
    """y = x W^T + bias; of the factors one is trained at a time, the others are kept, all at least in float32.

    K-step: W = K V^T, K (out, r) trained; U (out, r), S (r, r), V (in, r) kept.
    L-step: W = U L^T, L (in, r) trained; K, U, S, V kept.
    S-step: W = U S V^T, S (2r, 2r) trained; U (out, 2r), V (in, 2r) kept. With a fixed rank r for 2r.
    """

    choice = DLRT
    weights: DLRT

    def __init__(self, linear: nn.Linear, weights: DLRT, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.U: nn.Parameter
        self.V: nn.Parameter
        self.S: nn.Parameter
        self.K: nn.Parameter | None
        self.L: nn.Parameter | None
        weight, rank = linear.weight.detach(), weights.rank
        # a basis in bfloat16 is not orthonormal, and each change of basis would round the whole matrix
        wide = torch.promote_types(weight.dtype, torch.float32)
        if weight.is_meta:
            left, right = (weight.new_empty(size, rank, dtype=wide) for size in weight.shape)
            values = weight.new_empty(rank, dtype=wide)
        else:
            left, values, right = torch.linalg.svd(weight.to(wide), full_matrices=False)
            left, values, right = left[:, :rank], values[:rank], right[:rank].T
        self._begin(left, torch.diag(values), right)

    def _begin(self, left: Tensor, small: Tensor, right: Tensor) -> None:
        """A step of the integrator, from W = left small right^T."""
        self.U, self.S, self.V = kept(left.contiguous()), kept(small.contiguous()), kept(right.contiguous())
        self.K = nn.Parameter((self.U @ self.S).contiguous())
        self.register_parameter("L", None)

    @torch.no_grad()
    def end_k_(self) -> None:
        """K is done; L = V S^T, which stands for the W that K began with."""
        assert self.K is not None
        self.K = kept(self.K.detach())
        self.L = nn.Parameter((self.V @ self.S.T).contiguous())

    @torch.no_grad()
    def end_l_(self) -> None:
        """L is done; S in the new bases stands for the same W, or with a fixed rank for its part in their spans."""
        assert self.K is not None and self.L is not None
        left, right = self.K.detach(), self.L.detach()
        if self.weights.theta is not None:
            left, right = torch.cat([self.U, left], dim=1), torch.cat([self.V, right], dim=1)
        left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
        small = (left.T @ self.U) @ self.S @ (self.V.T @ right)
        self.U, self.S, self.V = kept(left.contiguous()), nn.Parameter(small.contiguous()), kept(right.contiguous())
        self.K = self.L = None

    @torch.no_grad()
    def end_s_(self) -> None:
        """S is done; the rank is cut back, and K begins anew."""
        small = self.S.detach()
        if self.weights.theta is None:
            self._begin(self.U.detach(), small, self.V.detach())
            return
        first, values, second = torch.linalg.svd(small)  # small = first diag(values) second
        rank = rank_within(values, self.weights.theta, min(self.in_features, self.out_features) // 2)
        self._begin(self.U @ first[:, :rank], torch.diag(values[:rank]), self.V @ second[:rank].T)

    def _product(self) -> tuple[Tensor, ...]:
        """The factors of W that this step trains with, from the output's side to the input's."""
        if self.L is not None:
            return self.U, self.L.T
        if self.K is not None:
            return self.K, self.V.T
        return self.U, self.S, self.V.T

    def dense_weight(self) -> Tensor:
        first, *others = self._product()
        for factor in others:
            first = first @ factor
        return first

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self._product()
        for factor in reversed(others):
            x = F.linear(x, factor.to(x.dtype))
        return F.linear(x, first.to(x.dtype), self.bias)

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        own = {name: param.shape for name, param in self.named_parameters() if name != "bias"}
        wanted = {name: shapes[name] for name in "KLSUV" if name in shapes}
        if "U" not in wanted or wanted == own:
            return
        trained = "L" if "L" in wanted else "K" if "K" in wanted else "S"
        like = self.U
        for name in "KLSUV":
            empty = like.new_zeros(wanted[name]) if name in wanted else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=name == trained))


def rank_within(values: Tensor, theta: float, most: int) -> int:
    """The least number of singular values after which the rest has a norm below theta |values|, in [2, most]."""
    tails = values.double().square().flip(0).cumsum(0).flip(0).sqrt()  # tails[j] = |values[j:]|
    rank = int((tails >= theta * tails[0]).sum())  # the j-th is the first tail below
    return max(min(rank, most), min(LEAST_RANK, len(values)))
