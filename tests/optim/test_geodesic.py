"""A step along a Grassmannian geodesic: orthonormal, identity at length 0, downhill, and back again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.subspace.geodesic import Geodesic
from lowrank_train.optim.transform import Slot, State, tensor_of
from tests.optim.test_all_subspaces import gradient

SHAPES = [(30, 12), (12, 30), (16, 16), (13, 7)]


def stepped(shape: tuple[int, int], step_size: float, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Old basis (d, R), new basis, and the target X (d, other side)."""
    subspace = Geodesic(rank=3, step_size=step_size)
    first, second = gradient(shape), gradient(shape, 1) * scale
    state: State = subspace.init(first, Slot("w", 0, 0.0, torch.float64))
    subspace.schedule_next(state, 0, subspace.refresh(first, state))
    (key,) = [key for key in state if key.startswith("basis")]
    before = tensor_of(state, key).clone()
    assert subspace.refresh(second, state)
    return before, tensor_of(state, key), second.T if key == "basis_right" else second


def loss(basis: Tensor, target: Tensor) -> Tensor:
    """||B B^T X - X||^2."""
    return (basis @ (basis.T @ target) - target).square().sum()


@pytest.mark.parametrize("step_size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_stays_orthonormal(shape: tuple[int, int], step_size: float) -> None:
    _, after, _ = stepped(shape, step_size)
    torch.testing.assert_close(after.T @ after, torch.eye(3).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_step_of_no_length_changes_nothing(shape: tuple[int, int]) -> None:
    before, after, _ = stepped(shape, 0.0)
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_moves_along_the_leading_term_of_the_slope(shape: tuple[int, int]) -> None:
    """(B' - B) / eta tends to the rank-1 part of minus the gradient of the loss, taken by autograd."""
    eta = 1e-7
    before, after, target = stepped(shape, eta)
    leaf = before.clone().requires_grad_()
    coordinates = torch.linalg.lstsq(before, target).solution
    (leaf @ coordinates - target).square().sum().backward()
    assert leaf.grad is not None
    left, sizes, right = torch.linalg.svd(leaf.grad, full_matrices=False)
    leading = sizes[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close((after - before) / eta, -leading, atol=1e-5 * sizes[0].item(), rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_goes_downhill(shape: tuple[int, int]) -> None:
    before, after, target = stepped(shape, 1e-3)
    assert loss(after, target) < loss(before, target)


@pytest.mark.parametrize("shape", SHAPES)
def test_angle_is_step_times_the_slope(shape: tuple[int, int]) -> None:
    """One principal angle turns, by eta times the leading singular value; the others are 0."""
    before, after, target = stepped(shape, 1e-3)
    slope = 2 * (target - before @ before.T @ target) @ (before.T @ target).T
    angle = 1e-3 * torch.linalg.matrix_norm(slope, 2)
    cosines = torch.linalg.svdvals(before.T @ after)
    torch.testing.assert_close(cosines[:-1], torch.ones(2).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(cosines[-1], angle.cos())


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_gradients_of_any_size_in_float32(scale: float) -> None:
    """Tiny ones turn the basis by nothing, huge ones by some angle; neither spoils it."""
    subspace, grad = Geodesic(rank=3), gradient((30, 12)).float()
    state = subspace.init(grad, Slot("w", 0, 0.0, torch.float32))
    subspace.schedule_next(state, 0, subspace.refresh(grad, state))
    subspace.refresh(gradient((30, 12), 1).float() * scale, state)
    basis = tensor_of(state, "basis_right")
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)


def test_tracks_a_subspace_that_turns() -> None:
    """Short steps bring a basis from one subspace to another one."""
    subspace, shape = Geodesic(rank=2, step_size=0.02), (20, 12)
    target = gradient((20, 2), 3) @ gradient((2, 12), 4)
    target = target / torch.linalg.matrix_norm(target, 2)
    state = subspace.init(target, Slot("w", 0, 0.0, torch.float64))
    subspace.schedule_next(state, 0, subspace.refresh(gradient(shape), state))
    for _ in range(1000):
        subspace.refresh(target, state)
    basis = tensor_of(state, "basis_right")
    torch.testing.assert_close(target @ basis @ basis.T, target, atol=1e-3, rtol=0)


def test_both_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy\.subspace\.side is full"):
        Geodesic(rank=2, side="full")
