"""LoRA-Pro's gradients against a least-squares problem written out in full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_train.nn.lora_pro import LoRAProLinear, adjusted
from tests.nn.test_lora import SHAPES, linear_of

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK


def parts(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and a full gradient G."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((RANK, shape[1]), (shape[0], RANK), shape)
    first, second, full = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return first, second, full


def nearest(first: Tensor, second: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Of all (hA, hB) for which s (B hA + hB A) is nearest to G, that nearest to (gA, gB) = (s B^T G, s G A^T): the
    least-norm solution for the difference, with the map (hA, hB) -> s (B hA + hB A) as an explicit matrix."""
    rows, columns = full.shape
    grad_a, grad_b = SCALE * second.T @ full, SCALE * full @ first.T
    through_a = np.kron(second.numpy(), np.eye(columns))  # row-major vec(B hA)
    through_b = np.kron(np.eye(rows), first.T.numpy())  # vec(hB A)
    matrix = SCALE * np.concatenate([through_a, through_b], axis=1)
    begun = np.concatenate([grad_a.numpy().ravel(), grad_b.numpy().ravel()])
    lacking = full.numpy().ravel() - matrix @ begun
    found = begun + np.linalg.lstsq(matrix, lacking, rcond=1e-10)[0]
    cut = RANK * columns
    return torch.from_numpy(found[:cut]).view(RANK, columns), torch.from_numpy(found[cut:]).view(rows, RANK)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_the_nearest_that_follow_the_full_gradient(shape: tuple[int, int]) -> None:
    """1e-6 relative: the damping of 1e-8 against Gram matrices with eigenvalues of size 1."""
    first, second, full = parts(shape)
    layer = LoRAProLinear.from_linear(linear_of(shape), rank=RANK, alpha=ALPHA)
    assert isinstance(layer, LoRAProLinear)
    with torch.no_grad():
        layer.A.copy_(first)
        layer.B.copy_(second)
    layer(torch.eye(shape[1], dtype=torch.float64)).T.mul(full).sum().backward()  # its gradient for W is G
    expected = nearest(first, second, full)
    assert layer.A.grad is not None and layer.B.grad is not None
    torch.testing.assert_close(layer.A.grad, expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.B.grad, expected[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_step_moves_b_alone(shape: tuple[int, int]) -> None:
    """B = 0: hA = gA = 0, hB = s^-2 gB (A A^T)^-1, so that s hB A = G A^+ A."""
    first, _, full = parts(shape)
    zero = torch.zeros(shape[0], RANK, dtype=torch.float64)
    moved_a, moved_b = adjusted(first, zero, SCALE * zero.T @ full, SCALE * full @ first.T, SCALE)
    assert not moved_a.any()
    torch.testing.assert_close(SCALE * moved_b @ first, full @ torch.linalg.pinv(first) @ first, atol=1e-6, rtol=1e-6)


def test_adjusting_is_linear_so_that_micro_batches_may_be_added_up() -> None:
    first, second, full = parts((20, 12))
    grads = [(SCALE * second.T @ part, SCALE * part @ first.T) for part in (full, full.roll(1, 0))]
    apart = [adjusted(first, second, *grad, SCALE) for grad in grads]
    together = adjusted(first, second, grads[0][0] + grads[1][0], grads[0][1] + grads[1][1], SCALE)
    for number in (0, 1):
        torch.testing.assert_close(apart[0][number] + apart[1][number], together[number], atol=1e-9, rtol=1e-9)


def test_frozen_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy\.weights\.train_a"):
        LoRAProLinear.from_linear(linear_of((8, 8)), rank=2, train_a=False)
