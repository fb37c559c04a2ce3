"""Subspaces spanned by coordinates: some rows, some columns, or single entries of the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Direction, Entries, Lines, wide
from lowrank_train.optim.subspace.base import Side, Subspace
from lowrank_train.optim.transform import Change, Slot, State, counter, tensor_of


@dataclass
class Coordinates(Subspace):
    """A share `density` of the rows, columns or entries, chosen anew at every move. The residual is exactly the rest.

    choose="random": drawn without replacement (FRUGAL, arXiv 2411.07837). "top": those of the largest norm in the
    gradient at the move (GRASS, arXiv 2406.17660, top-r), ties by the lower index. Stored as indices.
    """

    density: float | None = 0.25  # share of the rows, columns or entries; rounded down
    of: Literal["columns", "rows", "entries"] = "columns"
    choose: Literal["random", "top"] = "random"

    moved: ClassVar[tuple[str, ...]] = ("indices", "line_weights")

    def low_shape(self, shape: Size) -> tuple[int, ...]:
        count = self.rank_for(shape)
        return {"rows": (count, shape[1]), "columns": (shape[0], count), "entries": (count,)}[self.of]

    def rank_for(self, shape: Size) -> int:
        """How many rows, columns or entries are chosen."""
        return self.rank or max(1, int(self._total(shape) * (self.density or 0)))

    def side_of(self, state: State, shape: Size) -> Side:
        sides: dict[str, Side] = {"rows": "left", "columns": "right", "entries": "both"}
        return sides[self.of]

    def misfit(self, shape: Size) -> str | None:
        if self.rank is not None and self.rank > self._total(shape):
            return f"strategy.subspace.rank is {self.rank}, but must be at most its {self._total(shape)} {self.of}"
        return None

    def _total(self, shape: Size) -> int:
        return {"rows": shape[0], "columns": shape[1], "entries": shape.numel()}[self.of]

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        # index operations take int64; int32 would be widened at every use
        return {"indices": torch.arange(self.rank_for(param.shape), device=param.device)}

    def move(self, grad: Tensor, state: State) -> bool:
        count = self.rank_for(grad.shape)
        if self.choose == "random":
            chosen = torch.randperm(self._total(grad.shape), generator=seeded(state), device="cpu")[:count]
        else:
            scores = self._norms(grad)
            if not scores.any():
                return False
            chosen = scores.sort(descending=True, stable=True).indices[:count]
        tensor_of(state, "indices").copy_(chosen.sort().values)
        return True

    def _norms(self, grad: Tensor) -> Tensor:
        if self.of == "entries":
            return grad.flatten().abs()
        return torch.linalg.vector_norm(wide(grad), dim=1 - self._axis)

    def take(self, given: Tensor, state: State, shape: Size) -> None:
        """Indices of rows or columns, or positions in the flattened matrix, or pairs (2, R) of row and column."""
        if given.ndim == 2:
            given = given[0] * shape[1] + given[1]
        tensor_of(state, "indices").copy_(given)

    @property
    def _axis(self) -> int:
        return 0 if self.of == "rows" else 1

    def down(self, full: Tensor, state: State) -> Tensor:
        chosen = tensor_of(state, "indices")
        return full.take(chosen) if self.of == "entries" else full.index_select(self._axis, chosen)

    def up(self, low: Tensor, state: State, shape: Size) -> Direction:
        chosen = tensor_of(state, "indices")
        if self.of == "entries":
            return Entries(low, chosen, tuple(shape))
        return Lines(low, chosen, self._axis, tuple(shape))

    def subtract_(self, full: Tensor, low: Tensor, state: State, by: float = 1.0) -> Tensor:
        self.up(low, state, full.shape).add_to_(full, -by)
        return full

    def snapshot(self, state: State) -> Tensor:
        return tensor_of(state, "indices").clone()

    def change(self, before: Tensor, state: State) -> Change:
        return match_indices(before, tensor_of(state, "indices"), 0 if self.of == "entries" else self._axis)


@dataclass
class SampledLines(Coordinates):
    """Rows or columns drawn with replacement, each with a probability in proportion to its norm (GRASS, 2406.17660).

    low_j = w_j G[i_j];  up: w_j u_j is added to line i_j;  w_j = 1 / sqrt(R q_i), q_i = ||G_i|| / sum ||G||. So
    E[up(down(X))] = X on the lines whose norm is not 0, but up(down(.)) is no projection: a line drawn twice counts
    twice. Stored as indices and weights.
    """

    of: Literal["columns", "rows"] = "columns"

    orthonormal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choose != "random":
            raise ValueError(f"strategy.subspace.choose is {self.choose}, but lines sampled by norm are always random")

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        indices = super()._init_basis(param, slot)
        dtype = torch.promote_types(slot.dtype, torch.float32)  # bfloat16 weights would be biased by 0.4 %
        return indices | {"line_weights": torch.ones(self.rank_for(param.shape), dtype=dtype, device=param.device)}

    def move(self, grad: Tensor, state: State) -> bool:
        norms, indices, weights = self._norms(grad).double(), *self._stored(state)
        total = norms.sum()
        if total == 0:
            return False
        reached = norms.cumsum(0)
        drawn = torch.rand(len(indices), generator=seeded(state), device="cpu", dtype=torch.float64).to(reached.device)
        chosen = torch.searchsorted(reached, drawn * reached[-1], right=True)  # right: never a line of norm 0
        indices.copy_(chosen.sort().values)
        weights.copy_((total / norms[indices] / len(indices)).sqrt())
        return True

    def take(self, given: Tensor, state: State, shape: Size) -> None:
        raise ValueError("indices alone do not say with which weights lines were sampled")

    def down(self, full: Tensor, state: State) -> Tensor:
        return super().down(full, state).mul_(self._weights(state, full.dtype))

    def up(self, low: Tensor, state: State, shape: Size) -> Direction:
        return super().up(low * self._weights(state, low.dtype), state, shape)

    def snapshot(self, state: State) -> Tensor:
        raise ValueError("moments of sampled lines cannot be rotated; use on_refresh reset or keep")

    def _weights(self, state: State, dtype: torch.dtype) -> Tensor:
        weights = self._stored(state)[1].to(dtype)
        return weights[:, None] if self._axis == 0 else weights

    @staticmethod
    def _stored(state: State) -> tuple[Tensor, Tensor]:
        return tensor_of(state, "indices"), tensor_of(state, "line_weights")


def seeded(state: State) -> torch.Generator:
    """A generator for the draws of this move, from (parameter seed, number of moves)."""
    return torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))


def match_indices(before: Tensor, now: Tensor, axis: int) -> Change:
    """Coordinates of an index that stays move to its new slot along `axis`; those of a new index start at zero.

    What B_new^T B_old does for columns of one orthogonal matrix, without the product.
    """
    order = before.argsort()
    place = torch.searchsorted(before[order], now).clamp_max(len(before) - 1)
    source = order[place]
    kept = before[source] == now

    def apply(low: Tensor, *, squared: bool = False) -> Tensor:
        moved = low.index_select(axis, source)
        return moved * kept.to(low.dtype).view([-1 if d == axis else 1 for d in range(low.ndim)])

    return apply
