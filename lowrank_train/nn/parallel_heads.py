"""LoRA-the-Explorer: heads that each learn from their own part of the batch, averaged into one matrix now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept, normal
from lowrank_train.nn.rounding import add_

FACTORS = ("lora_A", "lora_B", "merged_A", "merged_B")


@dataclass
class ParallelHeads(Weights):
    """W + D_h for head h, D_h = s (B_h A_h - B'_h A'_h), s = alpha / rank (Huh et al., arXiv 2402.16828).

    Primes are the factors of the last merge. A micro-batch is cut along its first dimension into as many parts as there
    are heads, and head h sees part h alone. A merge, W <- W + mean of D_h, resets nothing: factors and moments go on.
    With across_ranks each of R processes has `heads` heads of its own, and the mean is taken over all R * heads.
    """

    heads: int = 4  # must divide the rows of a micro-batch; published: 32, so that heads * rank passes the largest side
    across_ranks: bool = False  # each process has other heads; else the same, and their gradients are averaged
    rank: int = 32
    alpha: float = 4096.0  # as published, for a learning rate of 0.05 to 0.1 of the dense one
    rounding: Rounding = "nearest"  # how a fold is rounded to a W in bfloat16; compensated costs 2 more bytes a weight

    def __post_init__(self) -> None:
        for key in ("heads", "rank"):
            if getattr(self, key) < 1:
                raise ValueError(f"strategy.weights.{key} is {getattr(self, key)}; it must be at least 1")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return ParallelHeadsLinear(linear, self, origin)


class ParallelHeadsLinear(ReparamLinear):
    """In training y_h = x_h (W + D_h)^T + bias for each part x_h of the batch, else y = x (W + mean of D_h)^T + bias.

    `weight` is W; `lora_A` (heads, rank, in_features), `lora_B` (heads, out_features, rank), and `merged_A`, `merged_B`
    the primes, zero before the first merge. A_h begins with orthogonal rows of length sqrt(in_features / rank), as in
    the published code, so that ||A x|| is ||x|| on average; the inverse factor that a note on the paper gives would
    shrink it by in_features / rank. B begins at 0. Between merges the published code evaluates W alone.

    With across_ranks rank k has the heads number k * heads to (k + 1) * heads - 1 of those that one process would have.
    A checkpoint holds all of them, and one process loads it as a layer of so many heads.
    """

    choice = ParallelHeads
    weights: ParallelHeads

    def __init__(self, linear: nn.Linear, weights: ParallelHeads, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.weight = kept(linear.weight.detach())
        heads, rank, like = weights.heads, weights.rank, self.weight
        self.ranks = 1  # over which the heads are spread
        self.update_of_all: Tensor | None = None  # the mean of D_h that all ranks have found together
        self.lora_A = nn.Parameter(self._first_compression(0))
        self.lora_B = nn.Parameter(like.new_zeros(heads, self.out_features, rank))
        self.merged_A = kept(torch.zeros_like(self.lora_A))
        self.merged_B = kept(torch.zeros_like(self.lora_B))
        self.residue: Tensor | None
        compensated = weights.rounding == "compensated" and like.dtype.itemsize < 4
        self.register_buffer("residue", torch.zeros_like(like) if compensated else None)

    def _first_compression(self, rank: int) -> Tensor:
        """A of the heads of a rank, drawn by the number that each has among all."""
        numbers = range(rank * self.weights.heads, (rank + 1) * self.weights.heads)
        generators = [self.origin.generator(f"lora_A {number}") for number in numbers]
        return torch.stack([_orthogonal(self.weights.rank, self.in_features, self.weight, one) for one in generators])

    @torch.no_grad()
    def place_(self, rank: int, ranks: int) -> None:
        if self.weights.across_ranks and ranks > 1:
            self.ranks = ranks
            self.lora_A.copy_(self._first_compression(rank))

    def rank_local(self) -> Sequence[str]:
        return FACTORS if self.ranks > 1 else ()

    @torch.no_grad()
    def meet_ranks_(self) -> None:
        self.update_of_all = None
        if self.ranks > 1:
            self.update_of_all = self.update_of_weight()

    def update_of_weight(self) -> Tensor:
        """The mean of D_h in at least float32. Where other ranks have heads too, all ranks must call it at once, unless
        they have met since the last forward pass in training."""
        if self.update_of_all is not None:
            return self.update_of_all.to(self.weight.device)
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        first = torch.cat([self.lora_A, self.merged_A]).to(wide).flatten(0, 1)  # the sum over heads is one product
        second = torch.cat([self.lora_B, -self.merged_B]).to(wide).transpose(0, 1).flatten(1)
        update = self.weights.scale / self.lora_A.shape[0] * (second @ first)
        if self.ranks > 1:
            update = update.detach() / self.ranks
            torch.distributed.all_reduce(update)
        return update

    def dense_weight(self) -> Tensor:
        update = self.update_of_weight()
        weight = self.weight.to(update.dtype)
        return (weight if self.residue is None else weight + self.residue) + update

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.update_of_all = None
        heads = self.lora_A.shape[0]
        if x.shape[0] % heads:
            raise ValueError(
                f"a batch of {x.shape[0]} rows cannot be cut into equal parts for {heads} heads; take a multiple of "
                f"{heads} rows, or other strategy.weights.heads"
            )
        parts = x.reshape(heads, -1, self.in_features)
        low = torch.bmm(parts, torch.cat([self.lora_A, self.merged_A], dim=1).mT)
        update = torch.bmm(low, torch.cat([self.lora_B, -self.merged_B], dim=2).mT)
        return F.linear(x, self.weight, self.bias) + self.weights.scale * update.reshape(*x.shape[:-1], -1)

    @torch.no_grad()
    def fold_(self, number: int = 1) -> None:
        """W <- W + mean of D_h; primes <- factors."""
        self.update_of_all = None
        add_(self.weight, self.update_of_weight(), self.weights.rounding, self.residue, self.origin, number)
        self.merged_A.copy_(self.lora_A)
        self.merged_B.copy_(self.lora_B)

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        """One process takes in the heads of all ranks."""
        self.update_of_all = None
        if not self.weights.across_ranks or self.ranks > 1 or not set(FACTORS) <= set(shapes):
            return
        for name in FACTORS:
            mine: Tensor = getattr(self, name)
            if mine.shape != shapes[name]:
                setattr(self, name, nn.Parameter(mine.new_empty(shapes[name]), requires_grad=mine.requires_grad))


def _orthogonal(rank: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """(rank, columns): rows that are orthogonal and of length sqrt(columns / rank), in the dtype of `like`."""
    if like.is_meta:
        return like.new_empty(rank, columns)
    wide = torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    basis, triangle = torch.linalg.qr(normal((columns, rank), 1.0, wide, generator))
    rows = (basis * triangle.diagonal().sign()).T * (columns / rank) ** 0.5
    return rows.to(like.device, like.dtype)
