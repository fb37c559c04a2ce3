"""NOLA's combinations against the bases written out, and the numbers that the bases are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowrank_train.nn import nola
from lowrank_train.nn.nola import NOLALinear, blocks_of_basis, combined
from tests.nn.test_lora import SHAPES, linear_of

BASES = 7


@pytest.mark.parametrize("block", [2**20, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_combinations_and_gradients_are_products(
    shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bases, one by one as the factors of unit coefficients; then random coefficients, y and all gradients by
    autograd through the written-out sum. 1e-12: float64."""
    monkeypatch.setattr(nola, "BLOCK_NUMBERS", block)
    layer = NOLALinear.from_linear(linear_of(shape), rank=3, alpha=6.0, bases=BASES, name="a")
    assert isinstance(layer, NOLALinear)
    assert torch.equal(layer.dense_weight(), layer.weight)
    bases: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for number in range(BASES):
        with torch.no_grad():
            layer.of_A.zero_()[number] = 1.0
            layer.of_B.zero_()[number] = 1.0
            first, second = layer.factors()
        bases[0].append(first - layer.start_A)
        bases[1].append(second)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.of_A.copy_(torch.randn(BASES, generator=generator))
        layer.of_B.copy_(torch.randn(BASES, generator=generator))
    of_a, of_b = (one.detach().clone().requires_grad_() for one in (layer.of_A, layer.of_B))
    first = layer.start_A + sum(c * basis for c, basis in zip(of_a, bases[0], strict=True))
    second = sum(c * basis for c, basis in zip(of_b, bases[1], strict=True))
    x = torch.randn(4, shape[1], dtype=torch.float64, generator=generator)
    expected = F.linear(x, layer.weight + 2.0 * second @ first)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.of_A.grad, of_a.grad, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(layer.of_B.grad, of_b.grad, atol=1e-10, rtol=1e-12)


def test_bases_are_uniform_and_follow_from_the_seed() -> None:
    """60 bases of 400 numbers in +-1/sqrt(60): mean 0 and variance 1/(3 * 60) within 5 standard errors, that is
    sqrt(1/3 / 24,000) and sqrt(4/45 / 24,000) of numbers in +-1, and no two bases alike."""
    like = torch.zeros(60, dtype=torch.float64)
    [(rows, basis)] = blocks_of_basis(like, 400, seed=11)
    assert (rows.start, rows.stop) == (0, 60)
    numbers = basis * 60**0.5
    assert 0.999 < numbers.abs().max() <= 1
    assert abs(numbers.mean()) < 5 * (1 / 3 / 24_000) ** 0.5
    assert abs(numbers.square().mean() - 1 / 3) < 5 * (4 / 45 / 24_000) ** 0.5
    gram = (numbers @ numbers.T / 400).fill_diagonal_(0)
    assert gram.abs().max() < 0.12  # 6 standard deviations, 1/3 / sqrt(400) each
    coefficients = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(combined(coefficients, (20, 20), 11), combined(coefficients, (20, 20), 11))
    assert not torch.equal(combined(coefficients, (20, 20), 11), combined(coefficients, (20, 20), 12))


def test_both_factors_learn_from_the_second_step_and_hold_2k_numbers() -> None:
    layer = NOLALinear.from_linear(linear_of((20, 12)), rank=3, bases=BASES)
    assert isinstance(layer, NOLALinear)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * BASES
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        layer(torch.ones(1, 12, dtype=torch.float64)).square().sum().backward()
        assert layer.of_A.grad is not None and layer.of_B.grad is not None
        assert layer.of_B.grad.all() and bool(layer.of_A.grad.all()) == (step == 2)
        optimizer.step()


@pytest.mark.parametrize("name", ["rank", "bases"])
def test_bad_values_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.weights\.{name} is 0"):
        NOLALinear.from_linear(linear_of((20, 12)), **{name: 0})  # type: ignore[arg-type]
