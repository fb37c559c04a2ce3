"""Affine codes: error bounds, packing, groups of one sign, stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Size

from lowrank_train.kernels.affine import Affine, dequantize_affine, empty_affine, quantize_affine

SHAPES = [(8, 32), (7, 13), (1, 1), (64, 3)]  # whole groups, an odd number of elements, shorter last groups


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_a_step(bits: int, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    coded = quantize_affine(values, bits=bits, group=32)
    decoded = dequantize_affine(coded, shape, bits=bits, group=32)
    step = coded.scale.repeat_interleave(32)[: values.numel()].view(shape)
    error = (decoded - values).abs()
    assert (error <= step * 1.0001).all()
    assert error.max() > 0.1 * step.min() or values.numel() == 1  # it does round
    inside = coded.zero.repeat_interleave(32)[: values.numel()].view(shape)
    whole = torch.round(values / step) + inside
    within = (whole >= 0) & (whole <= 2**bits - 1)
    assert (error[within] <= step[within] * 0.5001).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_group_of_one_sign(sign: float) -> None:
    """All numbers in [5, 6]: published code has no code for them and returns at most the width of the group."""
    values = sign * torch.linspace(5, 6, 64)
    coded = quantize_affine(values, bits=8, group=64)
    assert (dequantize_affine(coded, values.shape, bits=8, group=64) - values).abs().max() <= 6 / 255


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_the_formula(bits: int, shape: tuple[int, ...]) -> None:
    numel = Size(shape).numel()
    coded = quantize_affine(torch.randn(shape), bits=bits, group=32)
    counted = empty_affine(shape, bits=bits, group=32, device=torch.device("meta"))
    for one in (coded, counted):
        assert isinstance(one, Affine)
        assert one.codes.numel() == (numel if bits == 8 else (numel + 1) // 2)
        assert sum(part.numel() * part.element_size() for part in (one.scale, one.zero)) == -(-numel // 32) * 5
    assert {name: value.dtype for name, value in vars(coded).items()} == {
        name: value.dtype for name, value in vars(counted).items()
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_decoded_is_encoded_the_same(bits: int) -> None:
    values = torch.randn(5, 51, generator=torch.Generator().manual_seed(2))
    coded = quantize_affine(values, bits=bits, group=64)
    decoded = dequantize_affine(coded, values.shape, bits=bits, group=64)
    again = quantize_affine(decoded, bits=bits, group=64)
    torch.testing.assert_close(dequantize_affine(again, values.shape, bits=bits, group=64), decoded)


def test_zeros_stay_zero() -> None:
    assert not dequantize_affine(quantize_affine(torch.zeros(100), bits=4), (100,), bits=4).any()


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean over many draws comes to the number, which nearest rounding never reaches."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(256, generator=generator)
    draws = 4000
    total = torch.zeros(256)
    for _ in range(draws):
        coded = quantize_affine(values, bits=4, uniform=torch.rand(256, generator=generator))
        total += dequantize_affine(coded, (256,), bits=4)
    step = coded.scale[0]
    inner = (values > values.min() + step) & (values < values.max() - step)  # the ends are clamped
    deviation = (total / draws - values)[inner].abs().max()
    assert deviation < 5 * step * 0.5 / draws**0.5
    nearest = dequantize_affine(quantize_affine(values, bits=4), (256,), bits=4)
    assert (nearest - values)[inner].abs().max() > 0.4 * step


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_draws_decide_between_floor_and_ceiling(draw: float) -> None:
    values = torch.tensor([-1.0, 0.1, 0.49, 0.77, 1.0])
    coded = quantize_affine(values, bits=8, uniform=torch.full((5,), draw))
    whole = values / coded.scale
    expected = whole.floor() if draw else whole.ceil()
    expected = (expected + coded.zero).clamp(0, 255)
    assert coded.codes.tolist() == expected.int().tolist()
