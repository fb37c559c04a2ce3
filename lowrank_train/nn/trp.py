"""TRP: dense weights that are cut back to low rank every so many updates, with a pull towards a small nuclear norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_train.nn.events import Event, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights


@dataclass
class TRP(Weights):
    """Every `every` updates W <- U_r (S_r - lr * nuclear) V_r^T, r the least rank that holds `energy` of |W|_F^2.

    Trained rank pruning (arXiv 1812.02402, 2004.14566): U_r V_r^T is a subgradient of the nuclear norm where it stands.
    """

    every: int = 200  # updates; 1 in the published code, for small convolutions
    energy: float = 0.9  # of the squared singular values
    nuclear: float = 3e-4  # lambda, times the learning rate; ResNet-20's

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"strategy.weights.every is {self.every}; it must be at least 1")
        if not 0 < self.energy <= 1:
            raise ValueError(f"strategy.weights.energy is {self.energy}; it must lie in (0, 1]")
        if self.nuclear < 0:
            raise ValueError(f"strategy.weights.nuclear is {self.nuclear}; it must be at least 0")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return TRPLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        prune = each(TRPLinear, lambda layer, number, moments: layer.prune_(moments.lr(layer.weight)))
        return [Event("rank pruning", prune, self.every, self.every)]


class TRPLinear(ReparamLinear):
    """y = x W^T + bias with W = `weight` (out_features, in_features), trained as it is."""

    choice = TRP
    weights: TRP

    def __init__(self, linear: nn.Linear, weights: TRP, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        assert isinstance(linear.weight, nn.Parameter)
        self.weight = linear.weight

    def dense_weight(self) -> Tensor:
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    @torch.no_grad()
    def prune_(self, lr: float) -> None:
        """Cut W back, and take one step against the nuclear norm of what is left."""
        left, values, right = torch.linalg.svd(self.dense_weight(), full_matrices=False)
        rank = rank_holding(values, self.weights.energy)
        shorter = values[:rank] - lr * self.weights.nuclear
        self.weight.copy_(left[:, :rank] * shorter @ right[:rank])


def rank_holding(values: Tensor, energy: float) -> int:
    """The least number of singular values, largest first, whose squares are at least `energy` of all; at least 1."""
    held = values.double().square().cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(values))
