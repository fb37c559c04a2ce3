"""Subspaces with a stored basis of dense vectors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Direction, Product, wide
from lowrank_train.optim.subspace.base import Subspace, gaussian, resolve_side
from lowrank_train.optim.transform import Change, Slot, State, counter, tensor_of

KEYS = ("basis_left", "basis_right")


@dataclass
class DenseBasis(Subspace):
    """Holds B as `basis_left` (M, R), `basis_right` (N, R), or both, in the slot's dtype."""

    signs: Literal["aligned", "raw"] = "aligned"  # raw: LAPACK's whim, as the published codes have it

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        side, rank = resolve_side(self.side, param.shape), self.rank_for(param.shape)
        return {
            key: torch.zeros(dimension, rank, dtype=slot.dtype, device=param.device)
            for key, dimension in zip(KEYS, param.shape, strict=True)
            if side in (key.removeprefix("basis_"), "both")
        }

    def move(self, grad: Tensor, state: State) -> bool:
        """Find a new basis; each new vector takes the sign that points along the vector it replaces.

        The first ones get a positive largest entry. Singular vectors have arbitrary signs, and moments that are kept
        would otherwise change their meaning with the LAPACK in use: a third of the displacement in one measurement.
        """
        matrix = wide(grad.detach())
        largest = matrix.abs().amax()
        first = counter(state, "refreshes") == 0
        if largest == 0:
            if first:
                self._set(state, {key: self._arbitrary(key, state) for key in self._keys(state)})
            return False
        new = self.find(matrix / largest, state)  # products of tiny or huge gradients would leave float32's range
        if self.signs == "raw":
            self._set(state, new)
            return True
        self._set(state, {k: align_signs(basis, None if first else tensor_of(state, k)) for k, basis in new.items()})
        return True

    @abstractmethod
    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        """New bases, (dimension, R) each, by state key, for a finite non-zero float matrix (M, N)."""

    def take(self, given: Tensor, state: State, shape: Size) -> None:
        """Left (M, R), or right transposed (R, N), as the published projectors store it; both: a pair of them.

        A right basis that is not transposed, as Tucker factors are stored, is known by its shape.
        """
        parts = given if isinstance(given, tuple | list) else (given,)
        for key, part in zip(self._keys(state), parts, strict=True):
            basis = tensor_of(state, key)
            transposed = key == "basis_right" and part.T.shape == basis.shape
            basis.copy_(part.T if transposed else part)

    def down(self, full: Tensor, state: State) -> Tensor:
        left, right = self._bases(state, full.dtype)
        low = full if left is None else left.T.mm(full)
        return low if right is None else low.mm(right)

    def up(self, low: Tensor, state: State, shape: Size) -> Direction:
        left, right = self._bases(state, low.dtype)
        if left is not None and right is not None:
            return Product(left.mm(low), right.T)
        if left is not None:
            return Product(left, low)
        assert right is not None
        return Product(low, right.T)

    def subtract_(self, full: Tensor, low: Tensor, state: State, by: float = 1.0) -> Tensor:
        self.up(low, state, full.shape).add_to_(full, -by)
        return full

    def snapshot(self, state: State) -> Tensor:
        (key,) = self._keys(state)  # rotating on both sides has no published use
        return tensor_of(state, key).clone()

    def change(self, before: Tensor, state: State) -> Change:
        (key,) = self._keys(state)
        coefficients = wide(tensor_of(state, key)).T @ wide(before)  # (R new, R old)

        def apply(low: Tensor, *, squared: bool = False) -> Tensor:
            matrix = (coefficients.square() if squared else coefficients).to(low.dtype)
            return low.mm(matrix.T) if key == "basis_right" else matrix.mm(low)

        return apply

    def _bases(self, state: State, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        left, right = (tensor_of(state, key).to(dtype) if key in state else None for key in KEYS)
        return left, right

    def _keys(self, state: State) -> list[str]:
        return [key for key in KEYS if key in state]

    def _set(self, state: State, bases: dict[str, Tensor]) -> None:
        for key, basis in bases.items():
            tensor_of(state, key).copy_(basis)

    def _arbitrary(self, key: str, state: State) -> Tensor:
        basis = tensor_of(state, key)
        return torch.linalg.qr(gaussian(basis.shape, state, basis)).Q


def align_signs(new: Tensor, old: Tensor | None) -> Tensor:
    """Flip columns of `new` (dimension, R) to agree with `old`, or to have a positive largest entry."""
    if old is None:
        agreement = new.gather(0, new.abs().argmax(0, keepdim=True)).squeeze(0)
    else:
        agreement = (new * old.to(new.dtype)).sum(0)
    return torch.where(agreement < 0, -new, new)
