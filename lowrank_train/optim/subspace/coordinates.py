"""Subspaces spanned by coordinates: some rows, some columns, or single entries of the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Direction, Entries, Lines
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Slot, State, counter, tensor_of


@dataclass
class Coordinates(Subspace):
    """A share `density` of the rows, columns or entries, drawn anew at every move (FRUGAL, arXiv 2411.07837).

    Stored as indices. The residual is exactly the rest of the gradient.
    """

    density: float | None = 0.25  # share of the rows, columns or entries; rounded down
    of: Literal["columns", "rows", "entries"] = "columns"

    def _total(self, shape: Size) -> int:
        return {"rows": shape[0], "columns": shape[1], "entries": shape.numel()}[self.of]

    def _count(self, shape: Size) -> int:
        return self.rank or max(1, int(self._total(shape) * (self.density or 0)))

    def low_shape(self, shape: Size) -> tuple[int, ...]:
        count = self._count(shape)
        return {"rows": (count, shape[1]), "columns": (shape[0], count), "entries": (count,)}[self.of]

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        # index operations take int64; int32 would be widened at every use
        return {"indices": torch.arange(self._count(param.shape), device=param.device)}

    def move(self, grad: Tensor, state: State) -> bool:
        generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))
        drawn = torch.randperm(self._total(grad.shape), generator=generator)[: self._count(grad.shape)]
        tensor_of(state, "indices").copy_(drawn.sort().values)
        return True

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
        chosen = tensor_of(state, "indices")
        if by != 1.0:
            self.up(low, state, full.shape).add_to_(full, -by)
        elif self.of == "entries":
            full.put_(chosen, torch.zeros_like(low))
        else:
            full.index_fill_(self._axis, chosen, 0.0)
        return full
