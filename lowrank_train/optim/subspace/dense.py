"""Subspaces with a stored basis of dense vectors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Size, Tensor

from lowrank_train.kernels.affine import Affine, dequantize_affine, empty_affine, quantize_affine
from lowrank_train.optim.direction import Direction, Product, wide
from lowrank_train.optim.subspace.base import Side, Subspace, gaussian, largest_entry, resolve_side
from lowrank_train.optim.transform import Change, Slot, State, counter, tensor_of

KEYS = ("basis_left", "basis_right")
BITS = {"int8": 8, "int4": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS: dict[str, Any] = {"fp32": "float32", "bf16": "bfloat16", "q8": "int8", "q4": "int4"}
"""Of strategy.storage.basis."""


@dataclass
class DenseBasis(Subspace):
    """Holds B as `basis_left` (M, R), `basis_right` (N, R), or both, in the slot's dtype, or as affine codes.

    As codes a basis takes 8 or 4 bits a number and 5 bytes a group (Q-GaLore, arXiv 2407.08296, section 3.3), and is
    decoded at every use: a float32 temporary of the size of one basis while a gradient is projected, and again while an
    update is projected back. What is projected with is the decoded basis, which is not quite orthonormal.
    """

    signs: Literal["aligned", "raw"] = "aligned"  # raw: LAPACK's whim, as the published codes have it
    storage: Literal["state", "float32", "bfloat16", "int8", "int4"] = "state"  # state: as all optimizer state
    storage_group: int = 256  # int8, int4: numbers that share a scale

    moved: ClassVar[tuple[str, ...]] = KEYS
    codable: ClassVar[bool] = True  # moves as a whole; small steps would be lost in the rounding

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage_group < 1:
            raise ValueError(f"strategy.subspace.storage_group is {self.storage_group}; it must be at least 1")
        self.published_codes = False  # groups that leave 0 out, see quantize_affine
        self._check_storage(f"strategy.subspace.storage={self.storage}")

    def _check_storage(self, chosen: str) -> None:
        if self.storage in BITS:
            if not self.codable:
                raise ValueError(
                    f"{chosen} would lose the small steps by which the subspace {type(self).__name__} moves; use "
                    "strategy.storage.basis=null, fp32 or bf16"
                )
            vars(self)["orthonormal"] = False  # this one's, whatever the class says

    def store_basis_as(self, fmt: str) -> None:
        if self.storage not in ("state", FORMATS[fmt]):
            raise ValueError(
                f"strategy.storage.basis={fmt}, but strategy.subspace.storage={self.storage}; leave one of them out"
            )
        self.storage = FORMATS[fmt]
        self._check_storage(f"strategy.storage.basis={fmt}")

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        side, rank = resolve_side(self.side, param.shape), self.rank_for(param.shape)
        state: State = {}
        for key, dimension in zip(KEYS, param.shape, strict=True):
            if side in (key.removeprefix("basis_"), "both"):
                state |= self._empty(key, dimension, rank, slot.dtype, param.device)
        return state

    def low_shape_of(self, state: State, shape: Size) -> tuple[int, ...]:
        """By the bases, also of some rows of a matrix, whose shape would have another side."""
        ranks = {
            key: tensor_of(state, key).shape[1] if key in state else counter(state, f"{key}.rank")
            for key in self._keys(state)
        }
        left, right = (ranks.get(key, length) for key, length in zip(KEYS, shape, strict=True))
        return left, right

    def side_of(self, state: State, shape: Size) -> Side:
        sides: dict[tuple[str, ...], Side] = {KEYS[:1]: "left", KEYS[1:]: "right", KEYS: "both"}
        found = tuple(self._keys(state))
        return sides[found] if found else resolve_side(self.side, shape)  # a block that sleeps keeps no basis

    def _empty(self, key: str, dimension: int, rank: int, dtype: torch.dtype, device: torch.device) -> State:
        """A basis of zeros, as it is stored."""
        if self.storage not in BITS:
            return {key: torch.zeros(dimension, rank, dtype=DTYPES.get(self.storage, dtype), device=device)}
        bits, group = BITS[self.storage], self.storage_group
        empty = empty_affine((dimension, rank), bits=bits, group=group, device=device)
        coded: State = {f"{key}.{name}": value for name, value in vars(empty).items()}
        return coded | {f"{key}.dimension": dimension, f"{key}.rank": rank}

    def refresh(self, grad: Tensor, state: State) -> bool:
        if self.storage not in BITS:
            return super().refresh(grad, state)
        decoded = {key: self._decoded(key, state) for key in KEYS if f"{key}.codes" in state}
        opened = state | decoded
        moved = super().refresh(grad, opened)
        state.update({key: value for key, value in opened.items() if key not in decoded})
        if moved or counter(state, "refreshes") == 0:
            for key in decoded:
                self._encode(key, tensor_of(opened, key), state)
        return moved

    def move(self, grad: Tensor, state: State) -> bool:
        """Find a new basis; each new vector takes the sign that points along the vector it replaces.

        The first ones get a positive largest entry. Singular vectors have arbitrary signs, and moments that are kept
        would otherwise change their meaning with the LAPACK in use: a third of the displacement in one measurement.
        """
        matrix = wide(grad.detach())
        largest = largest_entry(matrix)
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

        A right basis that is not transposed, as Tucker factors are stored, is known by its shape, and so is a left one
        that is, as Flora's projections are.
        """
        parts = given if isinstance(given, tuple | list) else (given,)
        for key, part in zip(self._keys(state), parts, strict=True):
            basis = tensor_of(state, key)
            transposed = part.T.shape == basis.shape and (key == "basis_right" or part.shape != basis.shape)
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
        """The basis; both, one below the other, where both sides are compressed."""
        return torch.cat([self._basis(key, state) for key in self._keys(state)])

    def change(self, before: Tensor, state: State) -> Change:
        """By C = B_new^T B_old (R, R): low C^T on the right, C low on the left."""
        bases = {key: wide(self._basis(key, state)) for key in self._keys(state)}
        old = before.split([len(basis) for basis in bases.values()])
        turns = {key: basis.T @ wide(past) for (key, basis), past in zip(bases.items(), old, strict=True)}

        def apply(low: Tensor, *, squared: bool = False) -> Tensor:
            for key, turn in turns.items():
                matrix = (turn.square() if squared else turn).to(low.dtype)
                low = low.mm(matrix.T) if key == "basis_right" else matrix.mm(low)
            return low

        return apply

    def _bases(self, state: State, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        keys = self._keys(state)
        left, right = (self._basis(key, state).to(dtype) if key in keys else None for key in KEYS)
        return left, right

    def one_basis(self, state: State) -> tuple[Literal["left", "right"], Tensor]:
        """The side and its basis, decoded, where not both sides are compressed."""
        (key,) = self._keys(state)
        return "left" if key == "basis_left" else "right", self._basis(key, state)

    def _keys(self, state: State) -> list[str]:
        return [key for key in KEYS if key in state or f"{key}.codes" in state]

    def _basis(self, key: str, state: State) -> Tensor:
        return tensor_of(state, key) if key in state else self._decoded(key, state)

    def _decoded(self, key: str, state: State) -> Tensor:
        """(dimension, R) from codes, which follow the layout of the published projectors: right bases transposed."""
        codes, scale, zero = (tensor_of(state, f"{key}.{name}") for name in ("codes", "scale", "zero"))
        dimension, rank = counter(state, f"{key}.dimension"), counter(state, f"{key}.rank")
        shape = (rank, dimension) if key == "basis_right" else (dimension, rank)
        stored = Affine(codes, scale, zero)
        basis = dequantize_affine(stored, shape, bits=BITS[self.storage], group=self.storage_group)
        return basis.T if key == "basis_right" else basis

    def _encode(self, key: str, basis: Tensor, state: State) -> None:
        laid_out = basis.T if key == "basis_right" else basis
        bits, group = BITS[self.storage], self.storage_group
        encoded = quantize_affine(laid_out, bits=bits, group=group, published=self.published_codes)
        for name, value in vars(encoded).items():
            tensor_of(state, f"{key}.{name}").copy_(value)

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
