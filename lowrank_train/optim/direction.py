"""Updates left unevaluated until they are added to a parameter, so that no full-size temporary is made in vain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from lowrank_train.kernels.pieces import part, pieces, row_runs


@dataclass
class Direction(ABC):
    """An update before -lr: factor * raw().

    Bias correction is the factor and stays apart from the rest, since some lifts (Fira, APOLLO) measure and limit the
    update before it is corrected.
    """

    factor: float = field(default=1.0, kw_only=True)

    def scaled(self, by: float) -> Self:
        """The same direction, `by` times as long."""
        return replace(self, factor=self.factor * by)

    @abstractmethod
    def raw(self) -> Tensor:
        """The direction as one tensor, without the factor."""

    def tensor(self) -> Tensor:
        """The direction as one tensor of the parameter's shape."""
        return self.raw() if self.factor == 1.0 else self.raw() * self.factor

    @abstractmethod
    def add_to_(self, param: Tensor, alpha: float) -> None:
        """param += alpha * direction, in place."""


@dataclass
class Dense(Direction):
    """A direction that is a tensor."""

    value: Tensor

    def raw(self) -> Tensor:
        return self.value

    def add_to_(self, param: Tensor, alpha: float) -> None:
        param.add_(self.value, alpha=alpha * self.factor)


@dataclass
class Quotient(Direction):
    """factor * numerator / denominator, elementwise."""

    numerator: Tensor
    denominator: Tensor

    def raw(self) -> Tensor:
        return self.numerator / self.denominator

    def add_to_(self, param: Tensor, alpha: float) -> None:
        if param.dtype == self.numerator.dtype:
            param.addcdiv_(self.numerator, self.denominator, value=alpha * self.factor)
        else:  # mixed dtypes: add_ computes in the wider one and rounds once
            param.add_(self.raw(), alpha=alpha * self.factor)


@dataclass
class RootQuotient(Direction):
    """factor * numerator / (sqrt(square) + eps), elementwise: Adam's direction, straight from its moments."""

    numerator: Tensor
    square: Tensor
    eps: float

    def raw(self) -> Tensor:
        return wide(self.numerator) / wide(self.square).sqrt().add_(self.eps)

    def add_to_(self, param: Tensor, alpha: float) -> None:
        for into, numerator, square in pieces(param, self.numerator, self.square):
            denominator = wide(square).sqrt().add_(self.eps)
            if into.dtype == numerator.dtype == denominator.dtype:
                into.addcdiv_(numerator, denominator, value=alpha * self.factor)
            else:  # mixed dtypes: add_ computes in the wider one and rounds once
                into.add_(wide(numerator) / denominator, alpha=alpha * self.factor)


@dataclass
class Product(Direction):
    """factor * left @ right, the shape of a back-projected update."""

    left_MR: Tensor
    right_RN: Tensor

    def raw(self) -> Tensor:
        return self.left_MR.mm(self.right_RN)

    def add_to_(self, param: Tensor, alpha: float) -> None:
        param.addmm_(self.left_MR.to(param.dtype), self.right_RN.to(param.dtype), alpha=alpha * self.factor)


@dataclass
class Lines(Direction):
    """factor * values in the chosen rows (axis 0) or columns (axis 1) of a (M, N) tensor, zero elsewhere."""

    values: Tensor
    chosen: Tensor  # (R,) indices along `axis`
    axis: int
    shape: tuple[int, ...]

    def raw(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_add_(self.axis, self.chosen, self.values)

    def add_to_(self, param: Tensor, alpha: float) -> None:
        param.index_add_(self.axis, self.chosen, self.values.to(param.dtype), alpha=alpha * self.factor)


@dataclass
class Entries(Direction):
    """factor * values at chosen positions of the flattened (M, N) tensor, zero elsewhere."""

    values: Tensor  # (R,)
    chosen: Tensor  # (R,) positions
    shape: tuple[int, ...]

    def raw(self) -> Tensor:
        return self.values.new_zeros(self.shape).put_(self.chosen, self.values)

    def add_to_(self, param: Tensor, alpha: float) -> None:
        param.put_(self.chosen, (self.values * (alpha * self.factor)).to(param.dtype), accumulate=True)


@dataclass
class LineScaled(Direction):
    """factor * value * scale, with one scale a row (M, 1), a column (1, N), for all (1, 1), or for each number."""

    value: Tensor
    scale: Tensor

    def raw(self) -> Tensor:
        return self.value * self.scale

    def add_to_(self, param: Tensor, alpha: float) -> None:
        if param.dtype == self.value.dtype == self.scale.dtype:
            param.addcmul_(self.value, self.scale, value=alpha * self.factor)
            return
        for rows in row_runs(param):  # mixed dtypes: add_ computes in the wider one and rounds once
            param[rows].add_(self.value[rows] * part(self.scale, rows, param), alpha=alpha * self.factor)


@dataclass
class Factored(Direction):
    """factor * (value * row * column + left @ right), some rows at a time: Adafactor's update, and Flora's."""

    value: Tensor
    row: Tensor  # (M, 1)
    column: Tensor  # (1, N)
    left_MR: Tensor | None = None
    right_RN: Tensor | None = None

    def raw(self) -> Tensor:
        return self.rows_of(slice(None))

    def add_to_(self, param: Tensor, alpha: float) -> None:
        for rows in row_runs(param):
            param[rows].add_(self.rows_of(rows), alpha=alpha * self.factor)

    def rows_of(self, rows: slice) -> Tensor:
        """These rows of the direction without the factor."""
        made = self.value[rows] * part(self.row, rows, self.value)
        made.mul_(part(self.column, rows, self.value))
        if self.left_MR is not None and self.right_RN is not None:
            made.addmm_(self.left_MR[rows], self.right_RN)
        return made


@dataclass
class Sum(Direction):
    """factor * (first + second)."""

    first: Direction
    second: Direction

    def raw(self) -> Tensor:
        return self.first.tensor() + self.second.tensor()

    def add_to_(self, param: Tensor, alpha: float) -> None:
        self.first.add_to_(param, alpha * self.factor)
        self.second.add_to_(param, alpha * self.factor)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider, for norms and decompositions."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)
