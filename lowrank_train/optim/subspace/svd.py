"""The leading singular vectors of the gradient, exactly: GaLore's subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.transform import State, counter, tensor_of


@dataclass
class Svd(DenseBasis):
    """B = the first R left or right singular vectors of the gradient (arXiv 2403.03507, equation 12).

    The decomposition runs in float32 or wider on the gradient's device, thin. Where LAPACK does not converge, the
    eigenvectors of the Gram matrices in float64 are taken, which always exist, and counted as a fallback.
    """

    precision: Literal["wide", "float32"] = "wide"  # float32: also of a float64 gradient, as published

    def rank_for(self, shape: Size) -> int:
        return min(super().rank_for(shape), min(shape))  # a matrix has no more singular vectors

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        if self.precision == "float32":
            matrix = matrix.float()
        try:
            left, _, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
            right = right_transposed.T
        except torch.linalg.LinAlgError:
            state["fallbacks"] = counter(state, "fallbacks") + 1
            wide = matrix.double()
            left, right = (torch.linalg.eigh(gram).eigenvectors.flip(1) for gram in (wide @ wide.T, wide.T @ wide))
        found = {"basis_left": left, "basis_right": right}
        return {key: basis[:, : tensor_of(state, key).shape[1]] for key, basis in found.items() if key in state}
