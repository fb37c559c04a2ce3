"""y = x (s B A + S)^T + bias with S sparse, where nothing of the size of the weight outlives a forward or backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_train.kernels.dispatch import runs_kernel

TOKEN_BLOCK = 256  # rows of x at a time in the factored order: their transposes then stay in the second-level cache
# Measured on two cores of an AMD EPYC (Zen 4) with MKL, in multiply-adds of a large dense product, for one token: of an
# entry of S in its three products together, of a row or column in the transposes of x, y and their gradients, and how
# much longer one takes in the thin products.
ADDS_OF_ENTRY = 22
ADDS_OF_TRANSPOSE = 350
THIN = 1.15
HAS_SPARSE_PRODUCTS = torch.backends.mkl.is_available()  # on the CPU torch has them from MKL alone

warnings.filterwarnings("ignore", message="Sparse CS[RC] tensor support is in beta state")


def sparse_lowrank_linear(
    x: Tensor, first: Tensor, second: Tensor, scale: Tensor | float, values: Tensor, index: Tensor, bias: Tensor | None
) -> Tensor:
    """x W^T + bias with W = scale * second @ first + S (SLTrain, arXiv 2406.02214), for any leading dims of x.

    x (..., n), first A (r, n), second B (m, r), scale a number or a tensor of one, values (nnz,): what S holds at the
    ascending row-major flat indices `index` (nnz,), int32 or int64; bias (m,). Returns (..., m). All but `index` get
    gradients. Only x and the operands themselves are kept for backward. Under autocast the products are made in its
    dtype.
    """
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return _applied(x, first, second, scale, values, index, bias)
    with torch.autocast(kind, enabled=False):
        return _applied(x.to(torch.get_autocast_dtype(kind)), first, second, scale, values, index, bias)


def dense_matrix(first: Tensor, second: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """B A + S, (m, n); differentiable."""
    product = second @ first
    product.view(-1).index_add_(0, index, values)
    return product


def is_factored(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> bool:
    """Whether the factored order is the faster one for x (tokens, n), by counting multiply-adds; else the dense one.

    dense: three products with a matrix of m n, and four of m n r each to build it twice and to project its gradient.
    factored: seven products with a factor, and the sparse ones; only where MKL has them, and not on tensors that hold
    no numbers, such as the fake ones of a compiler.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not HAS_SPARSE_PRODUCTS:
        return False
    if torch.compiler.is_compiling() or type(index) is not Tensor:
        return False
    (rank, columns), rows, tokens = first.shape, second.shape[0], x.shape[0]
    dense = 3 * tokens * rows * columns + 4 * rows * columns * rank
    thin = THIN * rank * (3 * rows + 4 * columns)
    return tokens * (thin + ADDS_OF_ENTRY * len(index) + ADDS_OF_TRANSPOSE * (rows + columns)) < dense


def _applied(x: Tensor, *operands: Tensor | float | None) -> Tensor:
    result: Tensor = _SparseLowRank.apply(x, *operands)
    return result


class _SparseLowRank(torch.autograd.Function):
    """Three orders of the same sums: `dense` builds W for a moment, `factored` never has any matrix of m n, and kernels
    make W where they use it for few tokens, else as `dense` in one pass over it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, scale: Tensor | float, values: Tensor, index: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.scale = scale if isinstance(scale, float) else None
        ctx.save_for_backward(x, first, second, values, index, *([] if isinstance(scale, float) else [scale]))
        ctx.has_bias = bias is not None
        flat, dtype = x.reshape(-1, x.shape[-1]), x.dtype
        operands = ((first * scale).to(dtype), second.to(dtype), values.to(dtype), index)
        if runs_kernel(flat, *operands, bias):
            forward = _kernel_forward
        else:
            forward = _factored_forward if is_factored(flat, first, second, index) else _dense_forward
        result = forward(flat, *operands, None if bias is None else bias.to(dtype))
        return result.view(*x.shape[:-1], len(second))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, values, index, *tensor_scale = ctx.saved_tensors
        scale = tensor_scale[0] if tensor_scale else ctx.scale
        flat, flat_grad, dtype = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), x.dtype
        operands = ((first * scale).to(dtype), second.to(dtype), values.to(dtype), index)
        if runs_kernel(flat, flat_grad, *operands):
            backward = _kernel_backward
        else:
            backward = _factored_backward if is_factored(flat, first, second, index) else _dense_backward
        grad_x, grad_scaled, grad_second, grad_values = backward(flat, flat_grad, *operands, ctx.needs_input_grad[0])
        return (
            None if grad_x is None else grad_x.view(x.shape),
            (grad_scaled * scale).to(first.dtype),
            grad_second.to(second.dtype),
            (grad_scaled * first).sum().to(scale.dtype).view(scale.shape) if tensor_scale else None,
            grad_values.to(values.dtype),
            None,
            flat_grad.sum(0) if ctx.has_bias else None,
        )


Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor]
"""Of x, of s A, of B, of the values."""


def _dense_forward(
    x: Tensor, scaled: Tensor, second: Tensor, values: Tensor, index: Tensor, bias: Tensor | None
) -> Tensor:
    return torch.nn.functional.linear(x, dense_matrix(scaled, second, values, index), bias)


def _dense_backward(
    x: Tensor,
    grad: Tensor,
    scaled: Tensor,
    second: Tensor,
    values: Tensor,
    index: Tensor,
    of_x: bool,
    build: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = dense_matrix,
) -> Gradients:
    """W and then G = grad^T x exist, one after the other."""
    grad_x = grad @ build(scaled, second, values, index) if of_x else None
    of_weight = grad.T @ x
    return grad_x, second.T @ of_weight, of_weight @ scaled.T, of_weight.view(-1).index_select(0, index)


def _kernel_forward(
    x: Tensor, scaled: Tensor, second: Tensor, values: Tensor, index: Tensor, bias: Tensor | None
) -> Tensor:
    from lowrank_train.kernels.triton import sparse_lowrank as kernels

    if len(x) <= kernels.FEW_TOKENS:
        return kernels.sparse_lowrank_product(x, scaled, second, values, index, bias, input_gradient=False)
    return torch.nn.functional.linear(x, kernels.dense_matrix(scaled, second, values, index), bias)


def _kernel_backward(
    x: Tensor, grad: Tensor, scaled: Tensor, second: Tensor, values: Tensor, index: Tensor, of_x: bool
) -> Gradients:
    from lowrank_train.kernels.triton import sparse_lowrank as kernels

    if len(x) > kernels.FEW_TOKENS:
        return _dense_backward(x, grad, scaled, second, values, index, of_x, kernels.dense_matrix)
    grad_x = None
    if of_x:
        grad_x = kernels.sparse_lowrank_product(grad, scaled, second, values, index, None, input_gradient=True)
    of_first, of_second = (grad @ second).T @ x, grad.T @ (x @ scaled.T)
    return grad_x, of_first, of_second, kernels.sampled_product(grad, x, index)


def _factored_forward(
    x: Tensor, scaled: Tensor, second: Tensor, values: Tensor, index: Tensor, bias: Tensor | None
) -> Tensor:
    """(x (s A)^T) B^T + (S x^T)^T, some tokens at a time."""
    sparse = _rows(values, index, (len(second), scaled.shape[1]))
    result = x.new_empty(len(x), len(second))
    for some, out in zip(x.split(TOKEN_BLOCK), result.split(TOKEN_BLOCK), strict=True):
        _copy_transposed(out, sparse @ _transposed(some))
        out.addmm_(some @ scaled.T, second.T)
        if bias is not None:
            out.add_(bias)
    return result


def _factored_backward(
    x: Tensor, grad: Tensor, scaled: Tensor, second: Tensor, values: Tensor, index: Tensor, of_x: bool
) -> Gradients:
    """With h = x (s A)^T and k = grad B: grad_x = k s A + (S^T grad^T)^T, d(s A) = k^T x, dB = grad^T h, and the
    gradient of the values is grad^T x sampled at their indices."""
    shape = (len(second), scaled.shape[1])
    sampled = _rows(torch.zeros_like(values), index, shape)
    transposed = _rows(values, index, shape, transpose=True) if of_x else None
    grad_x = torch.empty_like(x) if of_x else None
    grad_scaled, grad_second = torch.zeros_like(scaled), torch.zeros_like(second)
    for begin in range(0, len(x), TOKEN_BLOCK):
        some, of_some = x[begin : begin + TOKEN_BLOCK], grad[begin : begin + TOKEN_BLOCK]
        across = _transposed(of_some)
        low = of_some @ second
        grad_scaled.addmm_(low.T, some)
        grad_second.addmm_(across, some @ scaled.T)
        torch.sparse.sampled_addmm(sampled, across, _transposed(some).T, out=sampled)
        if grad_x is not None and transposed is not None:
            out = grad_x[begin : begin + TOKEN_BLOCK]
            _copy_transposed(out, transposed @ across)
            out.addmm_(low, scaled)
    return grad_x, grad_scaled, grad_second, sampled.values()


def _transposed(matrix: Tensor) -> Tensor:
    """Contiguous. The third dimension is there because torch copies a transposed matrix with one thread."""
    return matrix[None].transpose(1, 2).contiguous()[0]


def _copy_transposed(out: Tensor, matrix: Tensor) -> None:
    """out <- matrix^T, likewise with all threads."""
    out[None].copy_(matrix.T[None])


def _rows(values: Tensor, index: Tensor, shape: tuple[int, int], transpose: bool = False) -> Tensor:
    """S by compressed rows, (m, n), or its transpose, (n, m); made for each call, so that only `index` is stored."""
    rows, columns = shape
    starts = torch.arange(rows + 1, dtype=torch.int64, device=index.device) * columns
    begins = torch.searchsorted(index, starts.to(index.dtype)).int()
    within = (index % columns).int()
    if transpose:
        same = torch.sparse_csc_tensor(begins, within, values, (columns, rows), check_invariants=False)
        return same.to_sparse_csr()
    return torch.sparse_csr_tensor(begins, within, values, shape, check_invariants=False)
