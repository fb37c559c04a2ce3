"""DoRA against its formula with autograd: start, output, gradients with the norm as a constant, folds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.dora import DoRALinear
from tests.nn.test_lora import SHAPES, linear_of

X = torch.randn(5, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def built(linear: nn.Linear, moved: bool = True, **options: Any) -> DoRALinear:
    """A layer whose g, A and B are no longer where they began."""
    layer = DoRALinear.from_linear(linear, rank=3, alpha=5.0, **options)
    assert isinstance(layer, DoRALinear)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for param in (layer.magnitude, *layer.factors) if moved else ():
            param.add_(torch.randn(param.shape, generator=generator, dtype=torch.float64) / 4)
    return layer


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_begins_as_the_linear_layer_with_its_row_norms(shape: tuple[int, int], init: str) -> None:
    """1e-12: the norm is found in two ways, and in between W0 is decomposed, in float64."""
    linear = linear_of(shape, bias=True)
    x, weight = X[..., : shape[1]], linear.weight.detach().clone()
    expected = linear(x)
    layer = built(linear, moved=False, init=init)
    torch.testing.assert_close(layer.magnitude.detach(), weight.norm(dim=1), atol=1e-15, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_those_of_the_formula(shape: tuple[int, int], bias: bool) -> None:
    """W = diag(g / ||V||) V formed whole, ||V|| detached; 1e-12 for sums of 20 terms in float64 in another order."""
    layer = built(linear_of(shape, bias=bias))
    x = X[..., : shape[1]].clone().requires_grad_()
    first, second = layer.factors

    def formula(x: Tensor) -> Tensor:
        direction = layer.weight + 5 / 3 * second @ first
        weight = (layer.magnitude / direction.detach().norm(dim=1))[:, None] * direction
        return F.linear(x, weight, layer.bias)

    trained = [x, first, second, layer.magnitude]
    pull = torch.randn(5, 3, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), formula(x), atol=1e-12, rtol=0)
    found = torch.autograd.grad((layer(x) * pull).sum(), trained)
    expected = torch.autograd.grad((formula(x) * pull).sum(), trained)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_with_dropout_the_change_sees_the_dropped_input() -> None:
    """x W0^T + (g/||V|| - 1) drop(x) W0^T + (g/||V||) s drop(x) A^T B^T, with one mask; 1e-12 as above."""
    layer = built(linear_of((8, 20), bias=True), dropout=0.5)
    first, second = layer.factors
    torch.manual_seed(2)
    found = layer(X)
    torch.manual_seed(2)
    dropped = F.dropout(X, 0.5)
    direction = layer.weight + 5 / 3 * second @ first
    ratio = layer.magnitude / direction.norm(dim=1)
    change = (ratio - 1) * (dropped @ layer.weight.T) + ratio * 5 / 3 * (dropped @ first.T @ second.T)
    torch.testing.assert_close(found, F.linear(X, layer.weight, layer.bias) + change, atol=1e-12, rtol=0)
    layer.eval()
    torch.testing.assert_close(layer(X), F.linear(X, layer.dense_weight(), layer.bias), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_norms_never_form_the_product(shape: tuple[int, int]) -> None:
    """Equal to the norms of W0 + s B A (1e-12, float64), with no matrix of W0's size made on the way."""
    layer = built(linear_of(shape))
    expected = (layer.weight + layer.update_of_weight()).norm(dim=1)
    torch.testing.assert_close(layer.norms_of_direction(), expected, atol=1e-12, rtol=0)
    wide = built(linear_of((300, 200)))
    made: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.data_ptr() != wide.weight.data_ptr():
                made.append(result.numel())
            return result

    with Sizes():
        wide.norms_of_direction()
    assert 300 * 3 <= max(made) < 300 * 200


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_fold_moves_everything_into_w0_and_leaves_its_norms_as_g(shape: tuple[int, int]) -> None:
    """Also where a length has become negative: the row is turned, g is positive again; 1e-12 for two products."""
    layer = built(linear_of(shape))
    with torch.no_grad():
        layer.magnitude[0] = -0.3
    dense = layer.dense_weight()
    layer.fold_(1)
    torch.testing.assert_close(layer.weight.detach(), dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.dense_weight(), dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.magnitude.detach(), dense.norm(dim=1), atol=1e-12, rtol=0)
    assert layer.magnitude[0] > 0 and not layer.factors[1].any()


def test_a_row_of_zeros_begins_at_zero_and_can_be_learnt() -> None:
    """Such a row has no direction; nothing may become NaN, and its length has a gradient once B has moved."""
    linear = linear_of((8, 20))
    with torch.no_grad():
        linear.weight[2] = 0
    layer = built(linear, moved=False)
    assert not layer(X)[..., 2].any()
    with torch.no_grad():
        layer.factors[1].fill_(0.1)
    layer(X).square().sum().backward()
    layer(X)[..., 2].sum().backward()
    assert layer.magnitude.grad is not None and layer.magnitude.grad.isfinite().all() and layer.magnitude.grad[2] != 0


def test_lengths_are_wide_in_bfloat16_so_that_the_output_begins_as_it_was() -> None:
    """Bit for bit: g / ||V|| is 1 where both are in float32, and a length in bfloat16 would lose small updates."""
    linear = linear_of((20, 12), torch.bfloat16)
    x = X[..., :12].bfloat16()
    expected = linear(x)
    layer = built(linear, moved=False)
    assert layer.magnitude.dtype is torch.float32
    assert torch.equal(layer(x), expected)
