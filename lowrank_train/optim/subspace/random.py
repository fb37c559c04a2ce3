"""Random subspaces: Gaussian matrices, and random orthonormal bases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_train.optim.subspace.base import gaussian
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.transform import State, tensor_of


@dataclass
class Gaussian(DenseBasis):
    """B with independent entries N(0, 1/R), drawn anew at every move: APOLLO's subspace (arXiv 2412.05270).

    E[B B^T] = I, but up(down(G)) is no projection: what it leaves out is not orthogonal to what it keeps.
    """

    orthonormal: ClassVar[bool] = False

    def move(self, grad: Tensor, state: State) -> bool:
        for key in self._keys(state):
            basis = tensor_of(state, key)
            basis.copy_(gaussian(basis.shape, state, basis) / math.sqrt(basis.shape[1]))
        return True

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        raise AssertionError("drawn, not found")


@dataclass
class Orthonormal(DenseBasis):
    """B = the orthonormal factor of a Gaussian matrix, drawn anew at every move (FRUGAL's `random`)."""

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        bases = {key: tensor_of(state, key) for key in self._keys(state)}
        return {key: torch.linalg.qr(gaussian(basis.shape, state, basis)).Q for key, basis in bases.items()}
