"""Products with U diag(sigma) V^T and their gradients, through the factors or through one passing dense matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]


class ThroughFactors(torch.autograd.Function):
    """y = ((x V) * sigma) U^T for two sets of columns, of which only the first has gradients for U and V.

    With P = x V and Q = dy U, both (tokens, k): dx = (Q * sigma) V^T, dsigma_i = sum over tokens of P_i Q_i, and
    dU_i = dy^T P_i, dV_i = x^T Q_i where `enhanced` (arXiv 2405.15481), sigma_i times these where not. No matrix of the
    size of W is formed; T (m + n) (2 k + r) multiplications for T tokens. Keeps x and P for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, enhanced: bool, x: Tensor, left: Tensor, right: Tensor, left_frozen: Tensor, right_frozen: Tensor,
        sigma: Tensor, sigma_frozen: Tensor,
    ) -> Tensor:  # fmt: skip
        seen, seen_frozen = x @ right, x @ right_frozen
        ctx.enhanced = enhanced
        ctx.save_for_backward(x, left, right, left_frozen, right_frozen, sigma, sigma_frozen, seen, seen_frozen)
        return _sum((seen, sigma, left), (seen_frozen, sigma_frozen, left_frozen))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, left, right, left_frozen, right_frozen, sigma, sigma_frozen, seen, seen_frozen = ctx.saved_tensors
        back, back_frozen = grad @ left, grad @ left_frozen
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _sum((back, sigma, right), (back_frozen, sigma_frozen, right_frozen))
        dleft, dright = grad.T @ seen, x.T @ back
        if not ctx.enhanced:
            dleft, dright = dleft * sigma, dright * sigma
        return None, dx, dleft, dright, None, None, (seen * back).sum(0), (seen_frozen * back_frozen).sum(0)


class ThroughDense(torch.autograd.Function):
    """As ThroughFactors, through W and G = dy^T x, each of which lives for one product and is built anew for the next.

    dx = dy W, dU_i = G v_i, dV_i = G^T u_i, dsigma_i = u_i^T G v_i; m n (3 T + 3 k + r) multiplications. For many
    tokens that is little more than a plain linear layer does, and no more than it keeps is kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, enhanced: bool, x: Tensor, left: Tensor, right: Tensor, left_frozen: Tensor, right_frozen: Tensor,
        sigma: Tensor, sigma_frozen: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.enhanced = enhanced
        ctx.save_for_backward(x, left, right, left_frozen, right_frozen, sigma, sigma_frozen)
        return x @ composed(left, right, left_frozen, right_frozen, sigma, sigma_frozen).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, left, right, left_frozen, right_frozen, sigma, _ = ctx.saved_tensors
        dx = grad @ composed(*ctx.saved_tensors[1:]) if ctx.needs_input_grad[1] else None
        dense = grad.T @ x
        along, along_frozen = left.T @ dense, left_frozen.T @ dense  # u_i^T G, a row each
        dsigma, dsigma_frozen = (along * right.T).sum(1), (along_frozen * right_frozen.T).sum(1)
        dleft, dright = dense @ right, along.T
        if not ctx.enhanced:
            dleft, dright = dleft * sigma, dright * sigma
        return None, dx, dleft, dright, None, None, dsigma, dsigma_frozen


def composed(
    left: Tensor, right: Tensor, left_frozen: Tensor, right_frozen: Tensor, sigma: Tensor, sigma_frozen: Tensor
) -> Tensor:
    """W = U diag(sigma) V^T of both sets of columns, (m, n)."""
    return torch.addmm((left_frozen * sigma_frozen) @ right_frozen.T, left * sigma, right.T)


def _sum(*products: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The sum of (rows * sigma) columns^T, added up in one tensor; the smaller of rows and columns is scaled."""
    rows, _, columns = products[0]
    total = rows.new_zeros(len(rows), len(columns))
    for rows, sigma, columns in products:
        if len(rows) < len(columns):
            total.addmm_(rows * sigma, columns.T)
        else:
            total.addmm_(rows, (columns * sigma).T)
    return total
