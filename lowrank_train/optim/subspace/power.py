"""The basis moved at every update by one step of power iteration on a blend of momentum and gradient: LDAdam's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank_train.optim.direction import wide
from lowrank_train.optim.subspace.base import gaussian, largest_entry, require_one_side
from lowrank_train.optim.subspace.randomized import orthonormalize
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import State, counter, tensor_of

OVERSAMPLING = 2  # LDAdam's code, of its randomised decomposition


@dataclass
class Power(Svd):
    """B <- QR(b^T (b B)), b = rho up(m) / (1 - b1^t) + (1 - rho) A (Robert et al., arXiv 2410.16103).

    m is the inner rule's first moment in the old basis and A the gradient with the error fed back. The first basis is
    the exact decomposition. With find_by="svd" every one is, and with "svd_lowrank" a randomised one of b (Halko,
    Martinsson and Tropp, arXiv 0909.4061): Q = orth(b Omega), Omega Gaussian with R + 2 columns; once Q <-
    orth(b orth(b^T Q)); B = the leading right singular vectors of Q^T b. Signs need no care: the moments are rotated.
    b is never formed for an iteration: up(m) = m B^T with B^T B = I, so that only A is multiplied, once by B and once
    transposed.
    """

    every: int = 1
    rho: float = 0.908  # the paper's, and the first beta of its Adam
    beta1: float | None = None  # of the inner Adam, with which m is corrected; None: rho
    find_by: Literal["power", "svd", "svd_lowrank"] = "power"
    signs: Literal["aligned", "raw"] = "raw"

    needs_state: ClassVar[frozenset[str]] = frozenset({"exp_avg", "step"})
    codable: ClassVar[bool] = False
    row_wise: ClassVar[bool] = False  # the momentum of all rows makes the basis

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_side(self)

    def move(self, grad: Tensor, state: State) -> bool:
        if counter(state, "refreshes") == 0:
            return super().move(grad, state)
        matrix, moment = wide(grad), wide(tensor_of(state, "exp_avg"))
        beta1 = self.rho if self.beta1 is None else self.beta1
        from_grad, from_moment = 1 - self.rho, self.rho / (1 - beta1 ** counter(state, "step"))
        largest = max(from_grad * largest_entry(matrix).item(), from_moment * largest_entry(moment).item())
        if largest == 0:
            return False
        from_grad, from_moment = from_grad / largest, from_moment / largest  # products of tiny ones would underflow
        if self.find_by != "power":
            up = wide(self.up(tensor_of(state, "exp_avg"), state, grad.shape).raw())
            find = self.find if self.find_by == "svd" else self._find_at_random
            self._set(state, find(from_moment * up + from_grad * matrix, state))
            return True
        (key,) = self._keys(state)
        if key == "basis_left":
            matrix, moment = matrix.T, moment.T
        basis = wide(tensor_of(state, key)).to(matrix.dtype)
        low = torch.addmm(moment, matrix, basis, beta=from_moment, alpha=from_grad)
        ahead = torch.addmm(basis @ (moment.T @ low), matrix.T, low, beta=from_moment, alpha=from_grad)
        self._set(state, {key: orthonormalize(ahead.float() if self.precision == "float32" else ahead)})
        return True

    def _find_at_random(self, blend: Tensor, state: State) -> dict[str, Tensor]:
        (key,) = self._keys(state)
        operand = blend if key == "basis_right" else blend.T
        operand = operand.float() if self.precision == "float32" else operand
        rank = tensor_of(state, key).shape[1]
        width = min(rank + OVERSAMPLING, *operand.shape)
        range_ = orthonormalize(operand @ gaussian((operand.shape[1], width), state, operand).to(operand.dtype))
        range_ = orthonormalize(operand @ orthonormalize(operand.T @ range_))
        return {key: torch.linalg.svd(range_.T @ operand, full_matrices=False).Vh.T[:, :rank]}
