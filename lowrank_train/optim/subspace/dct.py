"""The columns of one fixed cosine basis that hold most of the gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Direction, Product, wide, wide_dtype
from lowrank_train.optim.subspace.base import Side, Subspace, require_one_side, resolve_side
from lowrank_train.optim.subspace.coordinates import match_indices
from lowrank_train.optim.transform import Change, Slot, State, counter, tensor_of


@functools.cache
def cosine_basis(dimension: int, kind: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthogonal (dimension, dimension) matrix, made once per width and dtype and then kept, outside all state; counted
    by `shared_bytes`.

    dct2: cosines as columns; dct3: as rows; published: dct3 in float32 with the whole argument, off by up to 1e-5, and
    published_dct2 its transpose.
    """
    if kind.startswith("published"):
        whole = torch.arange(dimension, dtype=torch.float32)
        rows = math.sqrt(2 / dimension) * torch.cos(torch.outer(whole, 2 * whole + 1) * math.pi / (2 * dimension))
        rows[0] *= math.sqrt(0.5)
        return (rows.T if kind == "published_dct2" else rows).to(dtype).to(device)
    index = torch.arange(dimension, dtype=torch.float64)
    # the argument is reduced modulo 2 pi in integers, so that no digit is lost in wide matrices
    angle = (index[:, None] * (2 * index + 1) % (4 * dimension)) * (math.pi / (2 * dimension))
    rows = angle.cos() * math.sqrt(2 / dimension)
    rows[0] *= math.sqrt(0.5)
    basis = rows if kind == "dct3" else rows.T
    return basis.to(dtype).to(device).contiguous()


@dataclass
class Dct(Subspace):
    """The R columns of a cosine basis Q on which A Q has the largest norm (arXiv 2505.17967).

    Q is shared by all matrices of one width and is no state; the state is R indices. Moments are carried over by
    matching indices. norm=2 keeps the most energy, since Q is orthogonal; the published code takes the norm 1.
    """

    every: int = 1
    basis: Literal["dct2", "dct3", "published", "published_dct2"] = "dct2"
    norm: int = 2  # below 0: the norm -norm, times that of the basis vector itself, as the published code has it
    first_then_multiples: bool = False  # moves at update 1 and at multiples of `every`, as published
    order: Literal["index", "topk"] = "index"

    moved: ClassVar[tuple[str, ...]] = ("indices",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_side(self)

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        right = resolve_side(self.side, param.shape) == "right"
        indices = torch.arange(self.rank_for(param.shape), device=param.device)
        return {"indices": indices, "dimension": self._dimension(param.shape), "right": int(right)}

    def shared_bytes(self, params: Iterable[Tensor]) -> int:
        """A square matrix of each width, in float32 or wider."""
        sides = {(self._dimension(param.shape), wide_dtype(param.dtype)) for param in params}
        return sum(dimension**2 * dtype.itemsize for dimension, dtype in sides)

    def schedule_next(self, state: State, updates_done: int, moved: bool) -> None:
        super().schedule_next(state, updates_done, moved)
        if moved and self.first_then_multiples:
            state["refresh_at"] = (updates_done + 1) // self.every * self.every + self.every - 1

    def move(self, grad: Tensor, state: State) -> bool:
        matrix = wide(grad) if state["right"] else wide(grad).T
        whole = self._basis_of(state, matrix)
        scores = torch.linalg.vector_norm(matrix @ whole, ord=abs(self.norm), dim=0)
        if self.norm < 0:
            scores = scores * torch.linalg.vector_norm(whole, ord=-self.norm, dim=0)
        if not scores.any():
            return False
        kept = scores.topk(len(tensor_of(state, "indices")), sorted=self.order == "index").indices
        tensor_of(state, "indices").copy_(kept.sort().values if self.order == "index" else kept)
        return True

    def take(self, given: Tensor, state: State, shape: Size) -> None:
        tensor_of(state, "indices").copy_(given.flatten())

    def down(self, full: Tensor, state: State) -> Tensor:
        columns = self._columns(state, full)
        return full.mm(columns) if state["right"] else columns.T.mm(full)

    def up(self, low: Tensor, state: State, shape: Size) -> Direction:
        columns = self._columns(state, low)
        return Product(low, columns.T) if state["right"] else Product(columns, low)

    def subtract_(self, full: Tensor, low: Tensor, state: State, by: float = 1.0) -> Tensor:
        self.up(low, state, full.shape).add_to_(full, -by)
        return full

    def low_shape_of(self, state: State, shape: Size) -> tuple[int, ...]:
        """By what the state says, also of some rows of a matrix, whose shape would have another side."""
        rank = len(tensor_of(state, "indices"))
        return (shape[0], rank) if state["right"] else (rank, shape[1])

    def side_of(self, state: State, shape: Size) -> Side:
        return "right" if state["right"] else "left"

    def snapshot(self, state: State) -> Tensor:
        return tensor_of(state, "indices").clone()

    def change(self, before: Tensor, state: State) -> Change:
        """Moments of an index that stays move to its new slot; those of a new index start at zero."""
        if self.basis.startswith("published"):
            return self._published_change(before, state)
        return match_indices(before, tensor_of(state, "indices"), counter(state, "right"))

    def _published_change(self, before: Tensor, state: State) -> Change:
        """By a product of the bases, whose error of 1e-5 is a start of its own for the moments of a new index."""

        def apply(low: Tensor, *, squared: bool = False) -> Tensor:
            dimension = counter(state, "dimension")
            whole = cosine_basis(dimension, self.basis, wide_dtype(low.dtype), low.device).to(low.dtype)
            coefficients = whole[:, before].T @ whole[:, tensor_of(state, "indices")]  # (R old, R new)
            return low @ coefficients if state["right"] else coefficients.T @ low

        return apply

    def _columns(self, state: State, like: Tensor) -> Tensor:
        return self._basis_of(state, like).index_select(1, tensor_of(state, "indices")).to(like.dtype)

    def _basis_of(self, state: State, like: Tensor) -> Tensor:
        """One for all dtypes up to float32: a copy in bfloat16 would be kept beside it."""
        return cosine_basis(counter(state, "dimension"), self.basis, wide_dtype(like.dtype), like.device)

    def _dimension(self, shape: Size) -> int:
        return shape[1] if resolve_side(self.side, shape) == "right" else shape[0]
