"""The 4-bit NormalFloat codes of QLoRA: those of bitsandbytes, products and gradients those of the decoded matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_train.nn.nf4 import BLOCK, LEVELS, NF4Linear, decoded, encoded

SHAPES = [(40, 16), (16, 40), (32, 32), (7, 13)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_is_the_nearest_level(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scale = encoded(weight)
    blocks = -(-weight.numel() // 128) * 2
    assert codes.shape == (blocks * BLOCK // 2,) and scale.shape == (blocks,)
    found = decoded(codes, scale, *shape).flatten()
    for number, (value, back) in enumerate(zip(weight.flatten().tolist(), found.tolist(), strict=True)):
        largest = weight.flatten()[number // BLOCK * BLOCK :][:BLOCK].abs().max().item()
        best = min(abs(value - level * largest) for level in LEVELS)
        assert abs(value - back) == pytest.approx(best, abs=1e-6)


def test_zeros_stay_zeros() -> None:
    assert not decoded(*encoded(torch.zeros(9, 20)), 9, 20).any()


def test_the_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the extra `bnb` is not installed")
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    codes, scale = encoded(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(codes, theirs.flatten()) and torch.equal(scale, state.absmax)
    torch.testing.assert_close(torch.tensor(LEVELS), state.code, atol=0, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients_are_those_of_the_decoded_matrix(shape: tuple[int, int]) -> None:
    """In float64, where the decoded float32 numbers are exact; 1e-12: sums of at most 40 terms."""
    torch.manual_seed(3)
    linear = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    layer = NF4Linear(linear)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.plain(torch.float64)(x), expected, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-12)


def test_it_is_smaller_and_goes_through_a_state_dict() -> None:
    linear = nn.Linear(256, 128, bias=False)
    layer, other = NF4Linear(linear), NF4Linear(nn.Linear(256, 128, bias=False))
    kept = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert kept == 128 * 256 * 4.5 / 8
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.weight, layer.weight)
    narrow = layer.to(torch.bfloat16)
    assert narrow.weight.dtype == torch.bfloat16 and narrow.scale.dtype == torch.float32
