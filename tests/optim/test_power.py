"""LDAdam's basis from a randomised decomposition: beside torch's own of the same numbers, and what it captures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowrank_train
from lowrank_train.optim.subspace.base import gaussian
from lowrank_train.optim.subspace.power import Power
from lowrank_train.optim.transform import Slot, State, tensor_of

SHAPES = [(12, 7), (7, 12), (13, 9)]  # tall, wide, odd


def begun(shape: tuple[int, int], subspace: Power, seed: int = 5) -> tuple[State, Tensor]:
    """A state after its first move, with a first moment, and the gradient that comes next."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    state = subspace.init(first, Slot("w", seed, 0.0, torch.float64)) | {"updates_done": 0, "step": 1}
    assert subspace.refresh(first, state)
    subspace.schedule_next(state, 0, True)
    state["exp_avg"] = subspace.down(first, state) * 0.1
    return state, second


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_torchs_randomised_decomposition(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the blend and the same Gaussian numbers: the same space, whatever signs the vectors have."""
    subspace = Power(rank=3, find_by="svd_lowrank", side="std_left")
    state, grad = begun(shape, subspace)
    up = subspace.up(tensor_of(state, "exp_avg"), state, grad.shape).tensor()
    blend = 0.908 / (1 - 0.908) * up + (1 - 0.908) * grad
    drawn = gaussian((min(shape), 5), state, grad)
    assert subspace.refresh(grad, state)
    monkeypatch.setattr(torch, "randn", lambda *size, **_: drawn)
    left, _, right = torch.svd_lowrank(blend, q=5, niter=1)
    theirs = (right if shape[0] > shape[1] else left)[:, :3]
    ours = tensor_of(state, "basis_right" if shape[0] > shape[1] else "basis_left")
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-9, atol=1e-9)  # of 5-step float64 algebra


def test_each_draw_is_its_own_and_can_be_drawn_again() -> None:
    subspace = Power(rank=3, find_by="svd_lowrank")
    bases = []
    for seed in (5, 5, 6):
        state, grad = begun((12, 7), subspace, seed)
        subspace.refresh(grad, state)
        bases.append(tensor_of(state, "basis_right"))
    assert torch.equal(bases[0], bases[1])
    assert not torch.allclose(bases[0], bases[2])


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_the_gradients_have_low_rank_it_follows_the_exact_one(shape: tuple[int, int], published: bool) -> None:
    """Matrices of rank 3 lie in the span of five random images of them, so that nothing is left to chance.

    1e-4: two decompositions in float32, where published; else they agree to float64's rounding.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(shape[0], 3, generator=generator, dtype=torch.float64)
    grads = [left @ torch.randn(3, shape[1], generator=generator, dtype=torch.float64) for _ in range(6)]
    weights = []
    for method in ("svd", "svd_lowrank"):
        param = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
        pairs, options = [("mlp.weight", param)], {"rank": 3, "proj_method": method, "published": published}
        optimizer = lowrank_train.optimizer("ldadam", pairs, lr=1e-2, **options)  # type: ignore[arg-type]
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        weights.append(param.detach())
    torch.testing.assert_close(*weights, rtol=1e-4 if published else 1e-9, atol=1e-4 if published else 1e-9)
