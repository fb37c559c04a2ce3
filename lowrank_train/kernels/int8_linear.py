"""y = x W^T with W kept as 8-bit affine codes, which the kernel decodes tile by tile and the reference as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_train.kernels.affine import Affine, dequantize_affine_reference
from lowrank_train.kernels.dispatch import is_tile, runs_kernel


def int8_linear(
    x: Tensor, weight: Affine, shape: tuple[int, int], *, group: int = 256, owner: Tensor | None = None
) -> Tensor:
    """x W^T (Q-GaLore, arXiv 2407.08296, section 3.4), for any leading dims of x.

    x (..., n); weight: codes of W, of shape (m, n), 8 bits, in groups along the flattened matrix; returns (..., m). W
    is decoded to the dtype of x, under autocast its dtype; sums are float32. Differentiable in x, and in `owner`: codes
    have no gradient, so this tensor of the shape of W, of which nothing else is used, is given grad^T x.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    result: Tensor = _Int8Linear.apply(x, owner, weight.codes, weight.scale, weight.zero, shape, group)
    return result


def int8_linear_input_gradient(grad: Tensor, weight: Affine, shape: tuple[int, int], *, group: int = 256) -> Tensor:
    """grad W, (..., m) -> (..., n)."""
    return _product(grad, weight, shape, group, input_gradient=True)


class _Int8Linear(torch.autograd.Function):
    """Keeps the codes for backward and nothing decoded; x where there is an owner."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        owner: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        shape: tuple[int, int],
        group: int,
    ) -> Tensor:
        is_owned = owner is not None and owner.requires_grad
        ctx.save_for_backward(x if is_owned else None, codes, scale, zero)
        ctx.shape, ctx.group = shape, group
        return _product(x, Affine(codes, scale, zero), shape, group, input_gradient=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weight = ctx.saved_tensors
        grad, of_x, of_owner = grads[0], None, None
        if ctx.needs_input_grad[0]:
            of_x = int8_linear_input_gradient(grad, Affine(*weight), ctx.shape, group=ctx.group)
        if x is not None and ctx.needs_input_grad[1]:
            of_owner = grad.reshape(-1, ctx.shape[0]).T @ x.reshape(-1, ctx.shape[1])
        return of_x, of_owner, None, None, None, None, None


def _product(x: Tensor, weight: Affine, shape: tuple[int, int], group: int, input_gradient: bool) -> Tensor:
    if is_tile(group) and runs_kernel(x, weight.codes, weight.scale, weight.zero):
        from lowrank_train.kernels.triton import int8_linear

        return int8_linear.int8_product(x, weight, shape, group=group, input_gradient=input_gradient)
    return int8_product_reference(x, weight, shape, group=group, input_gradient=input_gradient)


def int8_product_reference(
    x: Tensor, weight: Affine, shape: tuple[int, int], *, group: int, input_gradient: bool
) -> Tensor:
    """x W^T, or x W for the gradient of the input, with all of W decoded."""
    dense = dequantize_affine_reference(weight, shape, bits=8, group=group).to(x.dtype)
    return x @ (dense if input_gradient else dense.T)
