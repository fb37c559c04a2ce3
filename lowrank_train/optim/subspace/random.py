"""Random subspaces: Gaussian matrices, and random orthonormal bases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_train.optim.subspace.base import gaussian
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import State, counter, tensor_of


@dataclass
class Gaussian(DenseBasis):
    """B with independent entries N(0, 1/R), drawn anew at every move: APOLLO's subspace (arXiv 2412.05270).

    E[B B^T] = I, but up(down(G)) is no projection: what it leaves out is not orthogonal to what it keeps.
    """

    orthonormal: ClassVar[bool] = False
    by_seed: ClassVar[bool] = True

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
        return random_bases({key: tensor_of(state, key) for key in self._keys(state)}, state)


@dataclass
class SvdThenRandom(Svd):
    """Singular vectors at first, random orthonormal bases from update `random_from` on (GoLore, arXiv 2410.11289).

    Near a minimum the leading directions of a stochastic gradient are those of its noise, and descent along them alone
    may stop; a random basis holds its share of the gradient whatever the noise.
    """

    random_from: int = 5000  # updates; the paper switches halfway through a run

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_from < 0:
            raise ValueError(f"strategy.subspace.random_from is {self.random_from}; it must be a number from 0 on")

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        if counter(state, "updates_done") < self.random_from:
            return super().find(matrix, state)
        return random_bases({key: tensor_of(state, key) for key in self._keys(state)}, state)


def random_bases(like: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """Orthonormal bases of these shapes, uniformly distributed, from (parameter seed, number of moves)."""
    return {key: torch.linalg.qr(gaussian(basis.shape, state, basis)).Q for key, basis in like.items()}
