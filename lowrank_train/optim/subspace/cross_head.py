"""The leading directions of one attention head, shared by all heads: GaLore+'s subspace."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowrank_train.optim.subspace.base import gaussian
from lowrank_train.optim.subspace.coordinates import seeded
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.subspace.randomized import orthonormalize
from lowrank_train.optim.transform import Slot, State, counter, tensor_of


@dataclass
class CrossHead(DenseBasis):
    """B = leading right singular vectors of G_i, for all of G = [G_1; ...; G_H] (GaLore+, arXiv 2412.19820).

    The head i is drawn at every move; low = G B (M, R). A decomposition of one head costs 1 / H of the whole. Matrices
    in `row_heads` stack their heads as rows, those in `column_heads` as columns and are treated as their transpose: the
    compressed side is the one that the heads share, whatever `side` says. If R is above head_dim, as many heads are
    drawn as R needs. All other matrices follow `side`, with S = G.

    Y = S Omega, Omega Gaussian (N, R + oversampling); Q = orth(S^T orth(Y)); `iterations` times
    Q <- orth(S^T orth(S Q)); B = Q times the leading right singular vectors of S Q, S the drawn heads. The paper shows
    queries and keys; values and the output matrix are ours, and end with a shorter list.
    """

    head_dim: int = 64  # columns of a head: hidden size / number of heads
    row_heads: list[str] = field(default_factory=lambda: ["*.q_proj.*", "*.k_proj.*", "*.v_proj.*"])
    column_heads: list[str] = field(default_factory=lambda: ["*.o_proj.*"])
    iterations: int = 1
    oversampling: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, smallest in (("head_dim", 1), ("iterations", 0), ("oversampling", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(
                    f"strategy.subspace.{name} is {getattr(self, name)}; it must be a whole number from {smallest} on"
                )

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        axis = self._heads_axis(slot.name)
        if axis is None:
            return super()._init_basis(param, slot) | {"heads": 0}
        heads, left_over = divmod(param.shape[axis], self.head_dim)
        if left_over:
            raise ValueError(
                f"strategy.subspace.head_dim is {self.head_dim}, but {slot.name} has {param.shape[axis]} "
                f"{('rows', 'columns')[axis]}, which are no whole number of heads; give hidden size / number of heads"
            )
        sided = replace(self, side="left" if axis == 1 else "right")
        return DenseBasis._init_basis(sided, param, slot) | {"heads": heads}

    def _heads_axis(self, name: str) -> int | None:
        for axis, patterns in enumerate((self.row_heads, self.column_heads)):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                return axis
        return None

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        operands = {"basis_left": matrix.T, "basis_right": matrix}  # heads are blocks of rows
        return {key: self._leading(self._sample(operands[key], key, state), key, state) for key in self._keys(state)}

    def _sample(self, operand: Tensor, key: str, state: State) -> Tensor:
        """The rows (S, N) that the basis is found from."""
        heads = counter(state, "heads")
        if not heads:
            return operand
        needed = math.ceil(tensor_of(state, key).shape[1] / self.head_dim)
        drawn = torch.randperm(heads, generator=seeded(state), device="cpu")[:needed].to(operand.device)
        return operand.unflatten(0, (heads, self.head_dim)).index_select(0, drawn).flatten(0, 1)

    def _leading(self, sample: Tensor, key: str, state: State) -> Tensor:
        dimension, rank = tensor_of(state, key).shape
        width = min(rank + self.oversampling, *sample.shape)
        basis = gaussian((dimension, width), state, sample).to(sample.dtype)
        for _ in range(1 + self.iterations):
            basis = orthonormalize(sample.T @ orthonormalize(sample @ basis))
        small = (sample @ basis).double()
        right = torch.linalg.eigh(small.T @ small).eigenvectors.flip(1)  # half the time of an SVD of it
        return basis @ right[:, :rank].to(basis.dtype)
