"""One head's basis for all heads: what it spans, which side it takes, how many heads, how good it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import ScaledResidual
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.cross_head import CrossHead
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of
from tests.optim.test_all_subspaces import gradient
from tests.optim.test_subspace import gradient as decaying

QUERY, OUTPUT, MLP = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.o_proj.weight", "layers.0.mlp.up.weight"


def started(subspace: CrossHead, grad: Tensor, name: str, seed: int = 0) -> State:
    state = subspace.init(grad, Slot(name, seed, 0.0, grad.dtype))
    subspace.schedule_next(state, 0, subspace.refresh(grad, state))
    return state


def angle(basis: Tensor, sample: Tensor) -> Tensor:
    """The largest principal angle between B (N, R) and the leading right singular vectors of a sample (S, N)."""
    exact = torch.linalg.svd(sample).Vh[: basis.shape[1]].T
    return torch.linalg.svdvals(exact.T @ basis)[-1].clamp_max(1.0).arccos()


def heads_of(grad: Tensor, count: int, axis: int) -> list[Tensor]:
    return list(grad.chunk(count, axis)) if axis == 0 else [head.T for head in grad.chunk(count, 1)]


@pytest.mark.parametrize(("name", "axis"), [(QUERY, 0), (OUTPUT, 1)])
def test_basis_is_that_of_one_head(name: str, axis: int) -> None:
    """Of a head drawn by the seed, and not of the whole matrix."""
    grad = torch.cat([decaying((8, 32), seed) for seed in range(4)])
    grad = grad if axis == 0 else grad.T
    drawn = set()
    for seed in range(12):
        subspace = CrossHead(rank=3, head_dim=8, iterations=4)
        state = started(subspace, grad, name, seed)
        basis = tensor_of(state, ("basis_right", "basis_left")[axis])
        angles = torch.stack([angle(basis, head) for head in heads_of(grad, 4, axis)])
        assert angles.min() < 1e-6 and angles.sort().values[1] > 0.1
        drawn.add(int(angles.argmin()))
        assert subspace.side_of(state, grad.shape) == ("right", "left")[axis]
    assert len(drawn) > 2


def test_wide_key_matrix_of_grouped_queries_is_compressed_on_the_side_its_heads_share() -> None:
    """By its shape alone it would be compressed on the other, across the heads."""
    subspace, grad = CrossHead(rank=4, head_dim=8), gradient((16, 64))
    state = started(subspace, grad, "layers.0.self_attn.k_proj.weight")
    assert tensor_of(state, "basis_right").shape == (64, 4)
    assert subspace.low_shape_of(state, grad.shape) == subspace.down(grad, state).shape == (16, 4)
    assert state["heads"] == 2


def test_rank_above_head_dim_takes_several_heads() -> None:
    subspace, grad = CrossHead(rank=10, head_dim=4, oversampling=8, iterations=6), gradient((16, 24))
    basis = tensor_of(started(subspace, grad, QUERY), "basis_right")
    torch.testing.assert_close(basis.T @ basis, torch.eye(10).double(), atol=1e-10, rtol=0)
    heads = grad.unflatten(0, (4, 4))
    inside = [torch.linalg.vector_norm(head @ basis) / torch.linalg.vector_norm(head) for head in heads]
    assert sum(part > 0.8 for part in inside) == 3  # 10 of the 12 dimensions that three heads span


def test_one_head_is_the_exact_decomposition() -> None:
    """H = 1 with as many test vectors as dimensions is GaLore's basis, signs included."""
    grad = gradient((20, 12))
    ours = started(CrossHead(rank=4, head_dim=20, oversampling=8), grad, QUERY)
    exact = Svd(rank=4)
    state = exact.init(grad, Slot("w", 0, 0.0, grad.dtype))
    exact.refresh(grad, state)
    torch.testing.assert_close(tensor_of(ours, "basis_right"), tensor_of(state, "basis_right"))


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 33)])
def test_close_to_the_exact_subspace_where_the_spectrum_decays(shape: tuple[int, int]) -> None:
    for seed in range(5):
        grad = decaying(shape, seed, decay=0.5)
        subspace = CrossHead(rank=8)
        state = started(subspace, grad, MLP, seed)
        key = next(key for key in state if key.startswith("basis"))
        assert angle(tensor_of(state, key), grad if key == "basis_right" else grad.T) < 0.1


def test_head_dim_must_divide() -> None:
    with pytest.raises(ValueError, match=r"head_dim is 5, but .*q_proj.weight has 16 rows"):
        CrossHead(rank=2, head_dim=5).init(torch.empty(16, 16), Slot(QUERY, 0, 0.0, torch.float32))


@pytest.mark.parametrize("name", [QUERY, OUTPUT, MLP])
def test_lifts_that_scale_lines_follow_the_side(name: str) -> None:
    """Fira's residual on a square matrix that is compressed on the left although `std` says right."""
    rule = InSubspace(CrossHead(rank=3, head_dim=4), Adam(), ScaledResidual(1.0))
    grad, param = gradient((16, 16)), torch.zeros(16, 16, dtype=torch.float64)
    state = rule.init(param, Slot(name, 0, 0.0, param.dtype))
    low = rule.compress(grad, state)
    direction = rule.update(low, state, param, Rates(1.0, 1.0), grad.clone()).tensor()
    axis = 0 if "basis_left" in state else 1
    moments = tensor_of(state, "exp_avg") / (tensor_of(state, "exp_avg_sq").sqrt() + 1e-8 * 0.001**0.5)
    phi = moments.norm(dim=axis, keepdim=True) / low.norm(dim=axis, keepdim=True)
    residual = grad - rule.subspace.up(low, state, param.shape).tensor()
    expected = rule.subspace.up(moments, state, param.shape).tensor() + phi * residual
    torch.testing.assert_close(direction, expected * (0.001**0.5 / 0.1))
