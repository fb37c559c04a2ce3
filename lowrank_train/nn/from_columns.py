"""Adapters of three factors made from rows and columns of W0: PMSS and NLoRA, with IntTune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_train.nn.as_lora import lora_options
from lowrank_train.nn.reparam import Origin
from lowrank_train.nn.three_factors import Factor, SVFit, ThreeFactors


@dataclass
class PMSS(ThreeFactors):
    """W = W0 + alpha W0[:, columns] C W0[rows], C from 0, alone trained (Wang et al., arXiv 2409.16722).

    The columns and rows are a skeleton of W0: those that QR with column pivoting takes first of W0, and of W0^T. They
    span nearly what the leading singular vectors span, and are numbers of the pre-trained matrix itself.
    """

    rank: int = 128
    alpha: float = 1.0

    @property
    def scale(self) -> float:
        return self.alpha

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        columns, rows = pivots(weight, self.rank), pivots(weight.T, self.rank)
        return weight[:, columns], weight.new_zeros(self.rank, self.rank), weight[rows]


@dataclass
class NLoRA(SVFit):
    """W = W' + L C R of Nystroem's approximation of W0, L = W0[:, :r], R = W0[:r], C = W0[:r, :r]^+ (2502.14482).

    All three are trained. W' = W0 - L C R, so that the layer begins as it was. The inverse of a small singular value
    would make C huge: those below 1e-3 of the largest count as 0.
    """

    rank: int = 16

    trained: ClassVar[tuple[Factor, ...]] = ("left", "core", "right")
    diagonal: ClassVar[bool] = False

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        left, right = weight[:, : self.rank].clone(), weight[: self.rank].clone()  # W0 is about to change
        return left, torch.linalg.pinv(right[:, : self.rank], rtol=1e-3), right

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return lora_options(2 * self.rank, 1.0)  # what W0 lacks, and what has come of it


@dataclass
class IntTune(NLoRA):
    """As NLoRA, with C alone trained (same paper)."""

    trained: ClassVar[tuple[Factor, ...]] = ("core",)


def pivots(matrix: Tensor, count: int) -> Tensor:
    """The columns that QR with column pivoting takes first: each the one with most left outside of those before it.

    Gram-Schmidt with one look back at each column, count * m n operations; equal lengths go to the first column.
    """
    residue = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).clone()
    chosen: list[int] = []
    for _ in range(count):
        lengths = residue.square().sum(0)
        lengths[chosen] = -1.0  # a matrix of lower rank leaves nothing: then any that is not there yet
        chosen.append(int(lengths.argmax()))
        column = residue[:, chosen[-1]]
        direction = column / column.norm().clamp_min(torch.finfo(residue.dtype).tiny)
        residue -= torch.outer(direction, direction @ residue)
    return torch.tensor(chosen, device=matrix.device)
