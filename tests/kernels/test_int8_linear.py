"""The linear layer with 8-bit weights: the product with the decoded matrix, its gradient, and what is kept."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.kernels.affine import dequantize_affine, quantize_affine
from lowrank_train.kernels.int8_linear import int8_linear, int8_linear_input_gradient

SHAPES = [(24, 16), (7, 33), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("leading", [(5,), (2, 3), ()], ids=str)
def test_as_the_decoded_matrix(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    """In float64, where both sums are exact to 1e-15 of their terms."""
    generator = torch.Generator().manual_seed(1)
    weight = quantize_affine(torch.randn(shape, generator=generator), bits=8, group=32)
    dense = dequantize_affine(weight, shape, bits=8, group=32).double()
    x = torch.randn(*leading, shape[1], generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*leading, shape[0], generator=generator, dtype=torch.float64)
    out = int8_linear(x, weight, shape, group=32)
    torch.testing.assert_close(out, x @ dense.T, rtol=1e-12, atol=1e-12)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(int8_linear_input_gradient(grad, weight, shape, group=32), x.grad)


def test_nothing_decoded_is_kept_for_backward() -> None:
    shape = (32, 64)
    weight = quantize_affine(torch.randn(shape), bits=8)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        int8_linear(torch.randn(3, 64, requires_grad=True), weight, shape)
    assert sum(tensor.nbytes for tensor in kept) == 32 * 64 + 5 * 8


def test_autocast_multiplies_in_its_dtype() -> None:
    shape = (8, 16)
    weight = quantize_affine(torch.randn(shape, generator=torch.Generator().manual_seed(2)), bits=8)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = int8_linear(x, weight, shape)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, x.bfloat16() @ dequantize_affine(weight, shape, bits=8).bfloat16().T)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32
