"""Random bases: their distribution, and the one that follows exact decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.random import Gaussian, Orthonormal, SvdThenRandom
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, tensor_of
from tests.optim.test_all_subspaces import gradient

SHAPE = (24, 16)


def bases(subspace: Svd | Orthonormal, updates: int) -> list[Tensor]:
    """The basis in force at each update, for gradients that are all the same but for noise."""
    rule, param = InSubspace(subspace, Adam(), Backproject(), "rotate"), torch.zeros(SHAPE, dtype=torch.float64)
    state = rule.init(param, Slot("w", 3, 0.0, param.dtype))
    found = []
    for update in range(updates):
        grad = gradient(SHAPE) + 0.1 * gradient(SHAPE, update + 1)
        rule.update(rule.compress(grad, state), state, param, Rates(1.0, 1.0))
        found.append(tensor_of(state, "basis_right").clone())
    return found


def test_exact_before_the_switch_and_random_after_it() -> None:
    """With moves at 0, 4, 8, ... and the switch at 6, the move at 8 is the first random one."""
    switching = bases(SvdThenRandom(rank=3, every=4, random_from=6), 16)
    exact = bases(Svd(rank=3, every=4), 16)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(switching[:8], exact[:8], strict=True))
    cosines = [torch.linalg.svdvals(mine.T @ theirs).min() for mine, theirs in zip(switching, exact, strict=True)]
    assert max(cosines[8:]) < 0.5
    for basis in switching[8:]:
        torch.testing.assert_close(basis.T @ basis, torch.eye(3).double(), atol=1e-12, rtol=0)
    assert not torch.allclose(switching[8], switching[12])


@pytest.mark.parametrize(("kind", "expected"), [(Orthonormal, 4 / 16), (Gaussian, 1.0)])
def test_share_of_a_fixed_direction_that_is_kept(kind: type[Orthonormal | Gaussian], expected: float) -> None:
    """E ||B^T x||^2 = R / d for an orthonormal basis, 1 for a Gaussian one; within 4 standard errors of 2000 draws."""
    kept = []
    for seed in range(2000):
        subspace, grad = kind(rank=4), gradient(SHAPE)
        state = subspace.init(grad, Slot("w", seed, 0.0, grad.dtype))
        subspace.refresh(grad, state)
        kept.append(tensor_of(state, "basis_right")[0].square().sum())
    shares = torch.stack(kept)
    assert (shares.mean() - expected).abs() < 4 * shares.std() / len(kept) ** 0.5


def test_switch_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"strategy\.subspace\.random_from is -1"):
        SvdThenRandom(rank=2, random_from=-1)
