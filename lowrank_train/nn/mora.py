"""MoRA: an update of high rank from one small square matrix between operators that have no parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept
from lowrank_train.nn.rounding import add_


@dataclass
class MoRA(Weights):
    """y = x W0^T + expand(M compress(x)), M square of side r = sqrt((m + n) rank) (Jiang et al., arXiv 2405.12130).

    M has as many numbers as LoRA's factors of this rank, but the update has rank r or, with rotation, more.
    sharing (equation 6, published type 1): features whose number is the same modulo r are added up, and M's output is
        repeated. As ReMoRA merges, groups of neighbours take the place of those features on both sides, of the input
        alone, of the output alone, and then of neither again (types 2, 3, 4, 1), so that rounds add different updates;
        their sum has rank 2 r - 1 at most, however many there are.
    rotation (equation 9, type 6): x is cut into groups of r, group i is turned by the angles i 10000^(-2j/r), and every
        group goes through M; for small ranks.
    """

    rank: int = 8  # of the LoRA with as many numbers
    operator: Literal["sharing", "rotation"] = "sharing"
    dropout: float = 0.0  # of what enters compress
    rounding: Rounding = "nearest"  # how a fold is rounded to a W0 in bfloat16; compensated costs 2 more bytes a weight

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"strategy.weights.dropout is {self.dropout}; it must lie in [0, 1)")

    def side(self, shape: tuple[int, int]) -> int:
        """r: sqrt((m + n) rank) rounded to the nearest, for rotation to the even number at or below."""
        found = int(math.sqrt(sum(shape) * self.rank) + 0.5)
        return found if self.operator == "sharing" else found // 2 * 2

    def misfit(self, shape: tuple[int, int]) -> str | None:
        side = self.side(shape)
        if side**2 >= shape[0] * shape[1]:
            most = shape[0] * shape[1] // sum(shape)
            return (
                f"strategy.weights.rank is {self.rank}, so that the square matrix, {side} x {side}, has no fewer "
                f"numbers than {shape[0]} x {shape[1]} itself; below {most} it has"
            )
        return None

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return MoRALinear(linear, self, origin)


class MoRALinear(ReparamLinear):
    """y = x W0^T + expand(M compress(drop(x))) + bias, with `weight` W0, M (r, r) from zero, `rounds` the folds so far.

    With rounding=compensated, `residue` holds what a bfloat16 `weight` cannot of the folded sum.
    """

    choice = MoRA
    weights: MoRA

    def __init__(self, linear: nn.Linear, weights: MoRA, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.side = weights.side((self.out_features, self.in_features))
        self.weight = kept(linear.weight.detach())
        self.M = nn.Parameter(self.weight.new_zeros(self.side, self.side))
        self.residue: Tensor | None
        compensated = weights.rounding == "compensated" and self.weight.dtype.itemsize < 4
        self.register_buffer("residue", torch.zeros_like(self.weight) if compensated else None)
        self.rounds: Tensor
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64, device=self.weight.device))
        self._turn = 0  # of the four ways of sharing: `rounds` modulo 4, known without asking the device

    def update_of(self, x: Tensor, matrix: Tensor) -> Tensor:
        """expand(M compress(x)), (..., in_features) -> (..., out_features)."""
        if self.weights.operator == "rotation":
            groups = min(math.ceil(self.in_features / self.side), math.ceil(self.out_features / self.side))
            turned = rotated(wrapped(x, self.side * math.ceil(self.in_features / self.side)), self.side, groups)
            return wrapped(F.linear(turned, matrix).flatten(-2)[..., : self.out_features], self.out_features)
        compress = sums_of_neighbours if self._turn in (1, 2) else sums_of_residues
        expand = repeated_neighbours if self._turn in (1, 3) else wrapped
        return expand(F.linear(compress(x, self.side), matrix), self.out_features)

    def update_of_weight(self) -> Tensor:
        """The matrix D with update_of(x) = x D^T, (out_features, in_features), in at least float32: what becomes of
        the columns of the identity."""
        matrix = self.M.to(torch.promote_types(self.M.dtype, torch.float32))
        identity = torch.eye(self.in_features, dtype=matrix.dtype, device=matrix.device)
        return self.update_of(identity, matrix).T

    def dense_weight(self) -> Tensor:
        update = self.update_of_weight()
        weight = self.weight.to(update.dtype)
        return (weight if self.residue is None else weight + self.residue) + update

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.weights.dropout, self.training)
        return F.linear(x, self.weight, self.bias) + self.update_of(dropped, self.M)

    @torch.no_grad()
    def fold_(self, number: int = 1) -> None:
        """W0 <- W0 + D; M = 0; sharing goes on with the other groups."""
        add_(self.weight, self.update_of_weight(), self.weights.rounding, self.residue, self.origin, number)
        self.M.zero_()
        self.rounds.fill_(number)
        self._turn = number % 4

    def renewed(self) -> Sequence[nn.Parameter]:
        return (self.M,)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.rounds.is_meta:
            self._turn = int(self.rounds.item()) % 4


def wrapped(x: Tensor, size: int) -> Tensor:
    """The last dimension repeated from its start until it has `size` entries."""
    whole, left = divmod(size, x.shape[-1])
    return x if (whole, left) == (1, 0) else torch.cat([x] * whole + [x[..., :left]], dim=-1)


def rotated(x: Tensor, side: int, groups: int) -> Tensor:
    """(..., k side) -> (..., groups, side): the first groups of `side` entries, group i turned by i 10000^(-2j/side),
    entry j together with entry j + side/2."""
    half = torch.arange(0, side, 2, dtype=torch.float64, device=x.device) / side
    angles = torch.arange(groups, dtype=torch.float64, device=x.device)[:, None] * 10000.0**-half
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., : groups * side].unflatten(-1, (groups, side)).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def sums_of_residues(x: Tensor, side: int) -> Tensor:
    """(..., n) -> (..., side): sums of the features j, j + side, ...; the first ones fill the last group up."""
    groups = math.ceil(x.shape[-1] / side)
    return wrapped(x, groups * side).unflatten(-1, (groups, side)).sum(-2)


def sums_of_neighbours(x: Tensor, side: int) -> Tensor:
    """(..., n) -> (..., side): sums of n // side neighbours, in the first n % side groups of one more."""
    size, longer = divmod(x.shape[-1], side)
    cut = longer * (size + 1)
    first = x[..., :cut].unflatten(-1, (longer, size + 1)).sum(-1)
    second = x[..., cut:].unflatten(-1, (side - longer, size)).sum(-1)
    return torch.cat([first, second], dim=-1)


def repeated_neighbours(y: Tensor, size: int) -> Tensor:
    """(..., side) -> (..., size): each entry size // side times, each of the first size % side once more."""
    times, longer = divmod(size, y.shape[-1])
    first = y[..., :longer].repeat_interleave(times + 1, dim=-1)
    return torch.cat([first, y[..., longer:].repeat_interleave(times, dim=-1)], dim=-1)
