"""WeLore: layers whose singular values fall off fast become trained factors, the others stay dense and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept

BISECTIONS = 60  # halvings of an interval of length 1: to the last bit of a float64


@dataclass
class WeLore(Weights):
    """W = B A, B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T of W0, both trained, or W0 frozen (Jaiswal et al., 2407.11239).

    With z = (sigma - min) / (max - min) of a layer's singular values, those with z < tau are dropped, with one tau for
    all layers, so that the mean share dropped is `rank_reduction`. Where the factors that are left are no smaller than
    W0, W0 stays as it is (the published code factorises there too, and the model grows).
    """

    rank_reduction: float = 0.5  # mean share of singular values dropped; null tau: found by bisection
    tau: float | None = None  # null: the one that drops rank_reduction

    def __post_init__(self) -> None:
        if not 0 < self.rank_reduction < 1:
            raise ValueError(f"strategy.weights.rank_reduction is {self.rank_reduction}; it must lie between 0 and 1")
        if self.tau is not None and not 0 <= self.tau < 1:
            raise ValueError(f"strategy.weights.tau is {self.tau}; it must lie in [0, 1)")

    def swap_(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        """On meta, where there are no singular values, every layer counts with the mean rank."""
        linears = {name: module for name, module in model.named_modules() if name in names}
        weights = {name: module.weight for name, module in linears.items() if isinstance(module, nn.Linear)}
        if any(weight.is_meta for weight in weights.values()):
            ranks = {name: self._mean_rank(weight) for name, weight in weights.items()}
        else:
            ranks = self.ranks({name: torch.linalg.svdvals(_wide(weight)) for name, weight in weights.items()})
        linears.clear()  # each goes before the next is made
        weights.clear()
        for name, rank in ranks.items():
            parent, _, leaf = name.rpartition(".")
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(model.get_submodule(parent), leaf, WeLoreLinear(linear, self, Origin(name, seed), rank))

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        """A layer by itself, whose share of dropped values is rank_reduction or follows from tau."""
        meta = linear.weight.is_meta
        rank = (
            self._mean_rank(linear.weight) if meta else self.ranks({"": torch.linalg.svdvals(_wide(linear.weight))})[""]
        )
        return WeLoreLinear(linear, self, origin, rank)

    def _mean_rank(self, weight: Tensor) -> int:
        return max(1, round(min(weight.shape) * (1 - self.rank_reduction)))

    def ranks(self, values_of: Mapping[str, Tensor]) -> dict[str, int]:
        """What is kept of each layer, from its singular values."""
        normalised = {}
        for name, values in values_of.items():
            span = (values.max() - values.min()).clamp_min(torch.finfo(values.dtype).tiny)
            normalised[name] = (values - values.min()) / span
        tau = self.tau
        if tau is None:
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                tau = (low + high) / 2
                shares = [(values < tau).double().mean().item() for values in normalised.values()]
                low, high = (tau, high) if sum(shares) / len(shares) < self.rank_reduction else (low, tau)
            tau = high
        return {name: max(1, int((values >= tau).sum())) for name, values in normalised.items()}


class WeLoreLinear(ReparamLinear):
    """y = (x A^T) B^T + bias with A (rank, in), B (out, rank), or y = x W0^T + bias with `weight` W0, frozen.

    A rank of which the factors are no smaller than W0 leaves it dense.
    """

    choice = WeLore
    weights: WeLore

    def __init__(self, linear: nn.Linear, weights: WeLore, origin: Origin, rank: int) -> None:
        super().__init__(linear, weights, origin)
        weight = linear.weight.detach()
        self.weight: nn.Parameter | None
        self.A: nn.Parameter | None
        self.B: nn.Parameter | None
        factorised = rank * (self.in_features + self.out_features) < self.in_features * self.out_features
        self.register_parameter("weight", None if factorised else kept(weight))
        self._factorise(_factors(weight, rank) if factorised else None)

    def _factorise(self, factors: tuple[Tensor, Tensor] | None) -> None:
        second, first = (None, None) if factors is None else map(nn.Parameter, factors)
        self.register_parameter("A", first)
        self.register_parameter("B", second)

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        like = next(self.parameters())
        if "A" in shapes and (self.A is None or self.A.shape != shapes["A"]):
            self.weight = None
            self._factorise((like.new_empty(shapes["B"]), like.new_empty(shapes["A"])))
        elif "weight" in shapes and self.weight is None:
            self.weight = kept(like.new_empty(shapes["weight"]))
            self._factorise(None)

    def dense_weight(self) -> Tensor:
        if self.weight is not None:
            return _wide(self.weight)
        assert self.A is not None and self.B is not None
        return _wide(self.B) @ _wide(self.A)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        assert self.A is not None and self.B is not None
        return F.linear(F.linear(x, self.A), self.B, self.bias)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A; of a meta tensor their shapes."""
    if weight.is_meta:
        return weight.new_empty(weight.shape[0], rank), weight.new_empty(rank, weight.shape[1])
    left, values, right = torch.linalg.svd(_wide(weight), full_matrices=False)
    root = values[:rank].sqrt()
    second, first = left[:, :rank] * root, root[:, None] * right[:rank]
    return second.to(weight.dtype).contiguous(), first.to(weight.dtype).contiguous()
