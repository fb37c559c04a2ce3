"""Which rows, columns and entries are chosen, and with which probabilities and weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.coordinates import Coordinates, SampledLines, match_indices
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of
from tests.optim.test_all_subspaces import gradient


def chosen(subspace: Subspace, grad: Tensor, seed: int = 0) -> State:
    state = subspace.init(grad, Slot("w", seed, 0.0, grad.dtype))
    subspace.schedule_next(state, 0, subspace.refresh(grad, state))
    return state


def test_top_takes_the_largest_norms_and_the_lower_index_of_equal_ones() -> None:
    grad = torch.tensor([[1.0, 5.0, 0.0, 3.0, 3.0], [2.0, -5.0, 0.1, 4.0, -4.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    pick = {"columns": [1, 3], "rows": [0, 1], "entries": [1, 6]}
    for of, expected in pick.items():
        state = chosen(Coordinates(rank=2, density=None, of=of, choose="top"), grad)  # type: ignore[arg-type]
        assert tensor_of(state, "indices").tolist() == expected


def test_top_keeps_more_of_the_gradient_than_any_other_choice() -> None:
    grad = gradient((9, 14))
    top = Coordinates(density=0.5, choose="top")
    kept = top.down(grad, chosen(top, grad)).square().sum()
    drawn = Coordinates(density=0.5)
    others = [drawn.down(grad, chosen(drawn, grad, seed)).square().sum() for seed in range(50)]
    assert kept > torch.stack(others).max()


@pytest.mark.parametrize("of", ["rows", "columns"])
def test_sampled_lines_come_as_often_as_their_norms_say(of: str) -> None:
    """Counts over 3000 draws of 4, within 5 standard deviations; a line of zeros never."""
    norms = torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0])
    grad = torch.diag(norms).double()
    counts = torch.zeros(5)
    for seed in range(3000):
        state = chosen(SampledLines(rank=4, density=None, of=of), grad, seed)  # type: ignore[arg-type]
        counts += tensor_of(state, "indices").bincount(minlength=5)
        q = norms[tensor_of(state, "indices")].double() / 10
        torch.testing.assert_close(tensor_of(state, "line_weights"), (4 * q).rsqrt())
    expected, deviation = 12000 * norms / 10, (12000 * norms / 10 * (1 - norms / 10)).sqrt()
    assert ((counts - expected).abs() <= 5 * deviation).all()


def test_a_line_drawn_twice_counts_twice() -> None:
    grad = torch.zeros(3, 4).double()
    grad[1] = 1.0
    subspace = SampledLines(rank=2, density=None, of="rows")
    state = chosen(subspace, grad)
    assert tensor_of(state, "indices").tolist() == [1, 1]
    torch.testing.assert_close(subspace.up(subspace.down(grad, state), state, grad.shape).tensor(), grad)


def test_unchosen_rows_do_not_change() -> None:
    """Only the selected rows of the weight move."""
    subspace, grad = Coordinates(rank=2, density=None, of="rows", choose="top"), gradient((8, 5))
    rule, param = InSubspace(subspace, Adam(), Backproject(1.0), "reset"), torch.zeros(8, 5).double()
    state = rule.init(param, Slot("w", 0, 0.0, param.dtype))
    rule.update(rule.compress(grad, state), state, param, Rates(1.0, 1.0)).add_to_(param, -1.0)
    assert set(param.any(1).nonzero().flatten().tolist()) == set(grad.norm(dim=1).topk(2).indices.tolist())


@pytest.mark.parametrize("axis", [0, 1])
def test_match_indices_in_any_order(axis: int) -> None:
    before, now = torch.tensor([4, 0, 7, 2]), torch.tensor([7, 1, 4, 9])
    low = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    moved = match_indices(before, now, axis)(low if axis == 1 else low.T)
    assert moved.flatten().tolist() == [3.0, 0.0, 1.0, 0.0]


def test_misfit_goes_by_the_lines_there_are() -> None:
    shape = torch.Size((4, 9))
    assert Coordinates(rank=9, density=None).misfit(shape) is None
    assert "at most its 4 rows" in str(Coordinates(rank=5, density=None, of="rows").misfit(shape))


def test_sampled_moments_cannot_rotate() -> None:
    subspace, grad = SampledLines(rank=2, density=None), gradient((5, 6))
    with pytest.raises(ValueError, match="on_refresh reset or keep"):
        subspace.snapshot(chosen(subspace, grad))
