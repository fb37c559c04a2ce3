"""Random bits from a seed and a place, and rounding by them."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.kernels.philox import random_16_bits, rounded_at_random

CPU = torch.device("cpu")


def test_the_generators_known_answer() -> None:
    """Counter and key of zeros, from the test vectors of Random123, the authors' own implementation."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert random_16_bits(0, 1, 8, CPU).tolist() == [expected]


@pytest.mark.parametrize("shape", [(1, 5), (3, 8), (7, 21)], ids=str)
def test_a_place_has_its_bits_whatever_the_shape(shape: tuple[int, int]) -> None:
    rows, columns = shape
    bits = random_16_bits(2**62 + 1, 9, 40, CPU)
    assert torch.equal(random_16_bits(2**62 + 1, rows, columns, CPU), bits[:rows, :columns])
    assert not torch.equal(random_16_bits(2**62 + 2, rows, columns, CPU), bits[:rows, :columns])


def test_bits_are_uniform() -> None:
    """Mean and each bit's share within five standard deviations, of 40,000 draws."""
    bits = random_16_bits(11, 200, 200, CPU).double()
    assert abs(bits.mean() - 32767.5) < 5 * 65536 / (12 * 40_000) ** 0.5
    for place in range(16):
        share = ((bits.long() >> place) & 1).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / 200


@pytest.mark.parametrize("value", [1.003, -0.7, 3e-5])
def test_rounding_is_right_on_average(value: float) -> None:
    """The mean of 40,000 roundings to one of two neighbours, within five of its standard deviations."""
    values = torch.full((200, 200), value)
    rounded = rounded_at_random(values, 5)
    neighbours = rounded.unique()
    assert len(neighbours) == 2
    gap = float(neighbours[1]) - float(neighbours[0])
    assert abs(rounded.double().mean() - values[0, 0].double()) < 5 * 0.5 * gap / 200
    assert rounded.bfloat16().float().unique().numel() == 2 and float(neighbours[0]) < value < float(neighbours[1])


def test_what_bfloat16_holds_stays() -> None:
    values = torch.tensor([1.0, 0.0, -2.5, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(rounded_at_random(values, 1).float(), values, rtol=0, atol=0, equal_nan=True)
