"""Maestro: factors whose components are ordered by training with random widths, and thinned where they fade away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.nn.events import Event, Moments, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights


@dataclass
class Maestro(Weights):
    """W = U V with k = min(m, n) components, fewer as some fade (arXiv 2308.14929).

    In each update one layer is cut to its first b components, the pair drawn from all pairs in turn. The penalty
    sum_i (|V[i:]|_F + |U[:, i:]|_F) draws the last components to zero; every `shrink_every` updates those are removed
    from the end for which |V[i:]|_F |U[:, i:]|_F < eps.
    """

    penalty: float = 5e-3  # lambda, times the learning rate
    eps: float = 1e-5  # the least importance of a component that stays
    shrink_every: int = 1000  # updates; an epoch in the paper

    def __post_init__(self) -> None:
        for name in ("penalty", "eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"strategy.weights.{name} is {getattr(self, name)}; it must be at least 0")
        if self.shrink_every < 1:
            raise ValueError(f"strategy.weights.shrink_every is {self.shrink_every}; it must be at least 1")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return MaestroLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        def shrink_groups(layer: MaestroLinear, number: int, moments: Moments) -> None:
            layer.shrink_groups_(moments.lr(layer.U) * self.penalty, moments.lr(layer.V) * self.penalty)

        def shrink(layer: MaestroLinear, number: int, moments: Moments) -> None:
            layer.slice_(max(1, int((layer.importance() >= self.eps).sum())))

        def choose(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
            ours = _ours(layers)
            index, width = self.pair_of(number, [layer.components for layer in ours], ours[0].origin.seed)
            for layer in ours:
                layer.set_width_(layer.components)
            ours[index].set_width_(width)

        events = [
            Event("thinning", each(MaestroLinear, shrink), self.shrink_every, self.shrink_every, restructures=True),
            Event("ordered dropout", choose, 1, 1, quiet=True),
        ]
        if self.penalty:
            events.insert(0, Event("group penalty", each(MaestroLinear, shrink_groups), 1, 1, quiet=True))
        return events

    def pair_of(self, number: int, components: Sequence[int], seed: int) -> tuple[int, int]:
        """The layer, by index, and its width for the update after number `number`.

        A walk over all pairs in random order, and then in another order; a thinning begins a new walk.
        """
        began, total = number - number % self.shrink_every, sum(components)
        lap, place = divmod(number - began, total)
        generator = torch.Generator().manual_seed(seed_from_name(seed, f"ordered dropout {began} {lap}"))
        position = int(torch.randperm(total, generator=generator)[place])
        for index, count in enumerate(components):
            if position < count:
                return index, position + 1
            position -= count
        raise AssertionError("unreachable: position < sum(components)")


class MaestroLinear(ReparamLinear):
    """y = x V^T U^T + bias, with U (out_features, k), V (k, in_features); in training only `width` of the k components.

    `width` is a buffer; its value is read once, when it is loaded or set, so that no forward pass waits for a device.
    """

    choice = Maestro
    weights: Maestro

    def __init__(self, linear: nn.Linear, weights: Maestro, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        weight = linear.weight.detach()
        count = min(weight.shape)
        if weight.is_meta:
            second, first = weight.new_empty(weight.shape[0], count), weight.new_empty(count, weight.shape[1])
        else:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
            root = values.sqrt()
            second, first = (left * root).to(weight.dtype), (root[:, None] * right).to(weight.dtype)
        self.U = nn.Parameter(second.contiguous())
        self.V = nn.Parameter(first.contiguous())
        self.width: Tensor
        self.register_buffer("width", torch.full((), count, device=weight.device))
        self._width = count

    @property
    def components(self) -> int:
        """k, which thinning makes smaller."""
        return self.V.shape[0]

    def set_width_(self, width: int) -> None:
        """Train with the first `width` components."""
        self.width.fill_(width)
        self._width = width

    @torch.no_grad()
    def slice_(self, count: int) -> None:
        """Keep the first `count` components only; the factors are new parameters then, without moments."""
        if count < self.components:
            self.U = nn.Parameter(self.U[:, :count].detach().clone(memory_format=torch.contiguous_format))
            self.V = nn.Parameter(self.V[:count].detach().clone(memory_format=torch.contiguous_format))
            self.set_width_(count)

    def importance(self) -> Tensor:
        """|V[i:]|_F |U[:, i:]|_F of each component i, which never rises: (k,)."""
        return tail_norms(self.V) * tail_norms(self.U.T)

    @torch.no_grad()
    def shrink_groups_(self, share_u: float, share_v: float) -> None:
        """A step down the penalty, by `share` times its gradient, that stops at zero where it would go beyond.

        Component i of V is multiplied by 1 - share_v sum_(j <= i) 1 / |V[j:]|_F, which goes on being right at zeros.
        """
        for factor, share in ((self.U.T, share_u), (self.V, share_v)):
            norms = tail_norms(factor)
            slope = torch.where(norms > 0, 1 / norms, 0.0).cumsum(0)
            factor.mul_((1 - share * slope).clamp_min(0).to(factor.dtype)[:, None])

    def dense_weight(self) -> Tensor:
        wide = torch.promote_types(self.U.dtype, torch.float32)
        return self.U.to(wide) @ self.V.to(wide)

    def forward(self, x: Tensor) -> Tensor:
        width = self._width if self.training else self.components
        return F.linear(F.linear(x, self.V[:width]), self.U[:, :width], self.bias)

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        if "V" in shapes and shapes["V"][0] != self.components:
            self.U = nn.Parameter(self.U.new_zeros(shapes["U"]))
            self.V = nn.Parameter(self.V.new_zeros(shapes["V"]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.width.is_meta:
            self._width = int(self.width)


def _ours(layers: Mapping[str, ReparamLinear]) -> list[MaestroLinear]:
    return [layer for layer in layers.values() if isinstance(layer, MaestroLinear)]


def tail_norms(factor: Tensor) -> Tensor:
    """|factor[i:]|_F for each row i of (k, n), in at least float32: (k,)."""
    squares = factor.to(torch.promote_types(factor.dtype, torch.float32)).square().sum(1)
    return squares.flip(0).cumsum(0).flip(0).sqrt()
