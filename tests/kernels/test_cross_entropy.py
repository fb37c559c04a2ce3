"""Chunked cross-entropy against torch's: value and both gradients, odd sizes, one tolerance per dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_train.kernels.cross_entropy import linear_cross_entropy_sum

# Relative, of the loss and of each gradient's norm. bfloat16: rounding of the logits' gradients, 2^-8 each.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-5), torch.bfloat16: (2e-3, 2e-2)}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("positions", "vocabulary", "chunk"), [(37, 101, 8), (64, 50, 64), (5, 3, 1000), (1, 7, 1)])
def test_against_torch(positions: int, vocabulary: int, chunk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, 19, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 19, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_positions=chunk)
    (loss * 0.5).backward()
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = nn.functional.cross_entropy(wide_hidden @ wide_weight.T, targets, reduction="sum")
    (expected * 0.5).backward()
    value, gradient = TOLERANCE[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=value)
    for ours, exact in ((hidden.grad, wide_hidden.grad), (weight.grad, wide_weight.grad)):
        assert ours is not None and exact is not None
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= gradient * exact.norm()


def test_no_positions() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss = linear_cross_entropy_sum(hidden, torch.ones(3, 4), torch.zeros(0, dtype=torch.long), chunk_positions=8)
    loss.backward()
    assert loss.item() == 0


def test_under_autocast() -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    targets = torch.arange(9) % 5
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, targets, chunk_positions=4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32
