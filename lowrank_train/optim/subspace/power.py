"""The basis moved at every update by one step of power iteration on a blend of momentum and gradient: LDAdam's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.direction import wide
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import State, counter, tensor_of


@dataclass
class Power(Svd):
    """B <- QR(b^T (b B)), b = rho up(m) / (1 - rho^t) + (1 - rho) A (Robert et al., arXiv 2410.16103).

    m is the inner rule's first moment in the old basis and A the gradient with the error fed back. The first basis is
    the exact decomposition. With find_by="svd" every one is. Signs need no care: the moments are rotated.
    """

    every: int = 1
    rho: float = 0.908  # also the first beta of the paper's Adam, with which m is corrected
    find_by: Literal["power", "svd"] = "power"
    signs: Literal["aligned", "raw"] = "raw"

    def move(self, grad: Tensor, state: State) -> bool:
        if counter(state, "refreshes") == 0:
            return super().move(grad, state)
        done = counter(state, "step")
        momentum = self.up(tensor_of(state, "exp_avg"), state, grad.shape).raw()
        blend = wide(momentum) * (self.rho / (1 - self.rho**done)) + (1 - self.rho) * wide(grad)
        largest = blend.abs().amax()
        if largest == 0:
            return False
        self._set(state, self.find(blend / largest, state))
        return True

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        if counter(state, "refreshes") == 0 or self.find_by == "svd":
            return super().find(matrix, state)
        (key,) = self._keys(state)
        operand = matrix if key == "basis_right" else matrix.T
        basis = operand.T @ (operand @ wide(tensor_of(state, key)).to(operand.dtype))
        if self.precision == "float32":
            basis = basis.float()
        return {key: torch.linalg.qr(basis).Q}
