"""Properties of every subspace: orthonormal, right side, captured energy, signs, bad gradients, moments of moving."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.base import Subspace, resolve_side
from lowrank_train.optim.subspace.randomized import Randomized, orthonormalize
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of

RATES = Rates(1e-2, 1e-2)

SHAPES = [(30, 12), (12, 30), (16, 16), (13, 7)]
KINDS = [Svd, Randomized]


def gradient(shape: tuple[int, int], seed: int = 0, decay: float = 0.6) -> Tensor:
    """Random singular vectors, singular values that fall geometrically."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (left * decay ** torch.arange(min(shape))) @ right


def started(subspace: Subspace, grad: Tensor, **slot: object) -> State:
    arguments = {"name": "w", "seed": 5, "phase": 0.0, "dtype": grad.dtype} | slot
    state = subspace.init(grad, Slot(**arguments))  # type: ignore[arg-type]
    moved = subspace.refresh(grad, state)
    subspace.schedule_next(state, 0, moved)
    return state


def bases(state: State) -> list[Tensor]:
    return [value for key, value in state.items() if key.startswith("basis") and isinstance(value, Tensor)]


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_geometry(kind: type[Subspace], shape: tuple[int, int], side: str) -> None:
    subspace = kind(rank=4, side=side)  # type: ignore[arg-type]
    grad = gradient(shape)
    state = started(subspace, grad)
    for basis in bases(state):
        torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=basis.dtype), atol=1e-10, rtol=0)
    low = subspace.down(grad, state)
    assert low.shape == subspace.low_shape(grad.shape)
    back = subspace.up(low, state, grad.shape).tensor()
    assert back.shape == grad.shape
    optimal = torch.linalg.svdvals(grad)[:4].square().sum()
    assert low.square().sum() / optimal > (1 - 1e-9 if kind is Svd else 0.98)
    again = subspace.down(back, state)
    torch.testing.assert_close(again, low)


def test_standard_side_is_the_short_one() -> None:
    assert [resolve_side("std", shape) for shape in [(3, 2), (2, 3), (2, 2)]] == ["right", "left", "right"]
    assert [resolve_side("reverse_std", shape) for shape in [(3, 2), (2, 3), (2, 2)]] == ["left", "right", "left"]


def test_warm_start_follows_a_moving_gradient() -> None:
    """One iteration from the old basis keeps what an exact decomposition would capture."""
    subspace, shape = Randomized(rank=4), (40, 24)
    state = started(subspace, gradient(shape))
    moved = gradient(shape) + 0.3 * gradient(shape, seed=1)
    subspace.refresh(moved, state)
    captured = subspace.down(moved, state).square().sum() / torch.linalg.svdvals(moved)[:4].square().sum()
    assert captured > 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_signs_follow_the_old_basis(kind: type[Subspace]) -> None:
    """The sign of a singular vector is LAPACK's whim; the negative gradient must not turn the basis round."""
    subspace, grad = kind(rank=4), gradient((30, 12))
    state = started(subspace, grad)
    before = bases(state)[0].clone()
    subspace.refresh(-grad, state)
    assert ((bases(state)[0] * before).sum(0) > 0.9).all()
    mirrored = started(kind(rank=4), -grad)
    if kind is Svd:  # also the first basis has signs of its own
        torch.testing.assert_close(bases(mirrored)[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_difficult_gradients(kind: type[Subspace], dtype: torch.dtype) -> None:
    """Zero, rank 1, tiny and huge gradients leave an orthonormal, finite basis."""
    one = torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 9))
    for grad in (torch.zeros(12, 8), one, one * 1e-30, one * 1e15):
        state = started(kind(rank=4), grad.to(dtype))
        basis = bases(state)[0].double()
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        torch.testing.assert_close(basis.T @ basis, torch.eye(4).double(), atol=tolerance, rtol=0)
        if grad.any():  # a matrix of rank 1 is captured whole
            inside = torch.linalg.vector_norm(grad.double() @ basis) / torch.linalg.vector_norm(grad.double())
            assert inside == pytest.approx(1, abs=tolerance)


def test_zero_gradient_keeps_the_basis_and_is_tried_again() -> None:
    subspace, grad = Svd(rank=4, every=10), gradient((30, 12))
    state = started(subspace, grad)
    before = bases(state)[0].clone()
    moved = subspace.refresh(torch.zeros_like(grad), state)
    subspace.schedule_next(state, 10, moved)
    assert not moved
    assert torch.equal(bases(state)[0], before)
    assert state["refresh_at"] == 11


def moves(subspace: Subspace, phase: float = 0.0, updates: int = 25) -> list[int]:
    rule = InSubspace(subspace, Adam(), Backproject())
    grad = gradient((30, 12))
    param, found = torch.zeros_like(grad), []
    state = rule.init(param, Slot("w", 0, phase, grad.dtype))
    for update in range(updates):
        if rule.refresh_due(state):
            found.append(update)
        rule.update(rule.compress(grad, state), state, param, RATES)
    return found


def test_moves_come_every_so_many_updates() -> None:
    assert moves(Svd(rank=2, every=10)) == [0, 10, 20]
    assert moves(Svd(rank=2, every=10, stagger=True), phase=0.35) == [0, 3, 13, 23]


def test_cold_start_depends_on_the_name_alone() -> None:
    grad = gradient((30, 12), decay=0.95)
    first, same = (bases(started(Randomized(rank=4, cold_iterations=1), grad))[0] for _ in range(2))
    other = bases(started(Randomized(rank=4, cold_iterations=1), grad, seed=6))[0]
    assert torch.equal(first, same)
    assert not torch.allclose(first, other, atol=1e-4)


def test_decomposition_that_does_not_converge_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = gradient((30, 12))
    expected = bases(started(Svd(rank=4), grad))[0]

    def diverge(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    state = started(Svd(rank=4), grad)
    torch.testing.assert_close(bases(state)[0], expected, atol=1e-7, rtol=0)
    assert state["fallbacks"] == 1


def test_bytes_are_the_papers() -> None:
    """GaLore, section 4.1: for M <= N, M N weights, M R projection, 2 N R moments."""
    rows, columns, rank = 48, 128, 16
    rule = InSubspace(Svd(rank=rank), Adam(), Backproject())
    state = rule.init(torch.empty(rows, columns, device="meta"), Slot("w", 0, 0.0, torch.bfloat16))
    elements = sum(value.numel() for value in state.values() if isinstance(value, Tensor))
    assert elements == rows * rank + 2 * columns * rank
    assert {value.dtype for value in state.values() if isinstance(value, Tensor)} == {torch.bfloat16}


def test_full_rank_from_a_fixed_identity_basis_is_plain_adam() -> None:
    grad = gradient((8, 8)).float()
    rule, plain = InSubspace(Svd(rank=8, every=1000), Adam(), Backproject(1.0)), Adam()
    slot, param = Slot("w", 0, 0.0, torch.float32), torch.zeros(8, 8)
    state, reference = rule.init(param, slot), plain.init(param, slot)
    tensor_of(state, "basis_right").copy_(torch.eye(8))
    state["refresh_at"] = 1000
    for scale in (1.0, -0.5, 2.0):
        ours = rule.update(rule.compress(grad * scale, state), state, param, RATES).tensor()
        torch.testing.assert_close(ours, plain.update(grad * scale, reference, param, RATES).tensor())


@pytest.mark.parametrize("condition", [1e0, 1e4, 1e9, float("inf")])
def test_orthonormalize(condition: float) -> None:
    """Orthonormal and of the same span, however dependent the columns are."""
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(60, 8, generator=generator, dtype=torch.float64)).Q
    sizes = (
        torch.logspace(0, -1, 8, base=condition) if condition < float("inf") else torch.tensor([1.0] * 5 + [0.0] * 3)
    )
    mixed = base * sizes @ torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    found = orthonormalize(mixed)
    torch.testing.assert_close(found.T @ found, torch.eye(8).double(), atol=1e-10, rtol=0)
    kept = found @ (found.T @ mixed)
    torch.testing.assert_close(kept, mixed, atol=1e-12, rtol=0)
