"""Exact moments at the positions where a subspace leaves most out: plain GaLore before, full Adam in the limit."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.sparse_residual import SparseResidual
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of
from tests.optim.test_all_subspaces import gradient

SHAPES = [(30, 12), (12, 30), (16, 16), (13, 7)]
RATES = Rates(1e-2, 1e-2)


def directions(rule: InSubspace | Adam, shape: tuple[int, int], updates: range) -> tuple[list[torch.Tensor], State]:
    param = torch.zeros(shape, dtype=torch.float64)
    state = rule.init(param, Slot("w", 0, 0.0, param.dtype))
    found = []
    for update in updates:
        grad = gradient(shape, update)
        low = rule.compress(grad, state)
        found.append(rule.update(low, state, param, RATES, grad.clone()).tensor().clone())
    return found, state


def galore_plus(**options: float) -> InSubspace:
    return InSubspace(Svd(rank=3, every=4), Adam(eps=1e-6, eps_inside=False), SparseResidual(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_positions_are_full_adam(shape: tuple[int, int]) -> None:
    """With every position chosen, what follows the warm-up is Adam on the whole gradient, whatever the subspace."""
    ours, _ = directions(galore_plus(share=1.0, warmup=2), shape, range(9))
    adam, _ = directions(Adam(eps=1e-6, eps_inside=False), shape, range(2, 9))
    for mine, theirs in zip(ours[2:], adam, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_is_galore_and_then_differs_at_the_positions_alone(shape: tuple[int, int]) -> None:
    ours, state = directions(galore_plus(share=0.1, warmup=3), shape, range(8))
    plain, _ = directions(
        InSubspace(Svd(rank=3, every=4), Adam(eps=1e-6, eps_inside=False), Backproject()), shape, range(8)
    )
    for mine, theirs in zip(ours[:3], plain[:3], strict=True):
        assert torch.equal(mine, theirs)
    positions = tensor_of(state, "positions").long()
    for mine, theirs in zip(ours[3:], plain[3:], strict=True):
        assert (mine.take(positions) - theirs.take(positions)).abs().min() > 1e-4
        elsewhere = torch.ones(shape, dtype=torch.bool).put_(positions, torch.zeros(len(positions), dtype=torch.bool))
        assert torch.equal(mine[elsewhere], theirs[elsewhere])


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_are_where_the_residual_was_largest(shape: tuple[int, int]) -> None:
    _, state = directions(galore_plus(share=0.1, warmup=3), shape, range(3))
    energy = torch.zeros(shape, dtype=torch.float64)
    subspace = Svd(rank=3, every=4)
    own = subspace.init(energy, Slot("w", 0, 0.0, energy.dtype))
    subspace.refresh(gradient(shape), own)
    for update in range(3):
        grad = gradient(shape, update)
        energy += (grad - subspace.up(subspace.down(grad, own), own, grad.shape).tensor()).square()
    count = int(0.1 * energy.numel())
    assert set(tensor_of(state, "positions").tolist()) == set(energy.flatten().topk(count).indices.tolist())


def test_memory_after_the_warmup() -> None:
    """4 bytes and two moments a position; the sums are gone."""
    lift, param = SparseResidual(share=0.1, warmup=1), torch.zeros(20, 30)
    before = lift.init(param, Slot("w", 0, 0.0, torch.bfloat16))
    _, after = directions(galore_plus(share=0.1, warmup=1), (20, 30), range(1))
    assert tensor_of(before, "residual_energy").shape == param.shape
    assert "residual_energy" not in after
    kept = ("positions", "position_exp_avg", "position_exp_avg_sq")
    assert sum(tensor_of(before, key).nbytes for key in kept) == 60 * (4 + 2 * 2)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"warmup": 0}])
def test_refused_values_name_their_key(options: dict[str, float]) -> None:
    (key,) = options
    with pytest.raises(ValueError, match=rf"strategy\.lift\.{key} is "):
        SparseResidual(**options)  # type: ignore[arg-type]
