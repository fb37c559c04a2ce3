"""Where kernels run in a test: on a GPU, or under Triton's interpreter in a process of its own, and what may differ."""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from lowrank_train.kernels.affine import Affine

Tensors = TypeVar("Tensors", Tensor, Affine, tuple)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
needs_device = [] if INTERPRETED else [pytest.mark.gpu]
"""Marks the tests of kernels: skipped where there is no GPU, but in the process that test_triton.py starts."""

TOLERANCE = {
    # Sums in another order, and fused multiply-adds: some units in the last place, of 6e-8, of the largest summand.
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    # Those move a number over the border between two neighbours now and then: one unit in the last place.
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
CODES_APART = 0 if INTERPRETED else 2e-4
"""Share of codes that may be another: on a GPU fused multiply-adds move a moment over the middle of two codes."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, decades: int = 0) -> Tensor:
    """Normal numbers on the CPU, where references run, spread over so many decades."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10 ** (-decades * torch.rand(shape, generator=generator))
    return values.to(dtype)


def there(tensors: Tensors) -> Tensors:
    """Copies on the device where kernels run."""
    if isinstance(tensors, Tensor):
        return tensors.to(DEVICE, copy=True)
    if isinstance(tensors, Affine):
        return Affine(*map(there, vars(tensors).values()))
    return tuple(map(there, tensors))


def assert_equal(got: Tensor | Affine, expected: Tensor | Affine) -> None:
    """Bit for bit."""
    if isinstance(got, Affine):
        for name, value in vars(expected).items():
            assert_equal(getattr(got, name), value)
    else:
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def assert_near(got: Tensor, expected: Tensor) -> None:
    """By the tolerance of the dtype."""
    torch.testing.assert_close(got.cpu(), expected, **TOLERANCE[expected.dtype])
