"""Linear layers whose trained matrix exists as 8-bit codes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights


@dataclass
class Int8(Weights):
    """W itself, kept as 8-bit codes with a scale and a zero for each group (Q-GaLore, arXiv 2407.08296, section 3.4).

    1 + 5 / group bytes a number, and nothing beside them: products decode W tile by tile or for their own length. The
    rule of the matrix updates a float32 copy of it, which is rounded to codes again, at random where updates must not
    be lost (precision.rounding=stochastic).
    """

    modules: list[str] = field(default_factory=list)  # patterns of module names; none: every linear layer but the head
    group: int = 256  # numbers along the rows that share a scale; the last may be fewer
    published: bool = False  # a group whose numbers have one sign is cut off, as in the published code

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"strategy.weights.group is {self.group}; it must be at least 1")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return Int8Linear(linear, self, origin)


class Int8Linear(ReparamLinear):
    """y = x W^T + bias, with W an Int8Weight: a parameter that has a gradient, and in a checkpoint three plain tensors,
    `weight.codes`, `weight.scale` and `weight.zero`."""

    choice = Int8
    weights: Int8

    def __init__(self, linear: nn.Linear, weights: Int8, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        coded = Int8Weight.of(linear.weight.detach(), group=weights.group, published=weights.published)
        self.weight = nn.Parameter(coded, requires_grad=linear.weight.requires_grad)

    def dense_weight(self) -> Tensor:
        return self._coded.decoded()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def _coded(self) -> Int8Weight:
        assert isinstance(self.weight, Int8Weight)
        return self.weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]
        for name, part in self._coded.parts().items():
            destination[f"{prefix}weight.{name}"] = part

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        parts = self._coded.parts()
        keys = {name: f"{prefix}weight.{name}" for name in parts}
        if all(key in state_dict for key in keys.values()):
            loaded = {name: state_dict.pop(key) for name, key in keys.items()}
            unfit = [
                f"size mismatch for {keys[name]}: {tuple(tensor.shape)} in the checkpoint, {tuple(part.shape)} here"
                for (name, part), tensor in zip(parts.items(), loaded.values(), strict=True)
                if tensor.shape != part.shape
            ]
            rest[-1].extend(unfit)  # torch's list of errors
            state_dict[f"{prefix}weight"] = self._coded if unfit else _with(self._coded, loaded)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Moves and casts the layer: the codes move, but what they are made of keeps its dtype.

        A matrix that stays where it is stays the same object, for hooks and optimizers know it by that.
        """
        param, weight = self.weight, self._coded
        self._parameters["weight"] = None  # and keeps its place among them
        try:
            super()._apply(fn, recurse)
            like = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
            if (like.dtype, like.device) != (weight.dtype, weight.device):
                parts = [part.to(like.device) for part in weight.parts().values()]
                moved = Int8Weight(parts, weight.shape, like.dtype, weight.group, weight.published)
                param = nn.Parameter(moved, requires_grad=weight.requires_grad)
        finally:
            self._parameters["weight"] = param
        return self


def _with(weight: Int8Weight, parts: dict[str, Tensor]) -> Int8Weight:
    return Int8Weight(list(parts.values()), weight.shape, weight.dtype, weight.group, weight.published)
