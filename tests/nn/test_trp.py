"""TRP: one cut against the decomposition, and twenty updates of SGD against the published order of things."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.events import Event
from lowrank_train.nn.trp import TRP, TRPLinear, rank_holding
from lowrank_train.optim.moments_of import moments_of

SHAPES = [(20, 12), (8, 20), (12, 12), (7, 5)]


def layer_of(shape: tuple[int, int], **options: object) -> TRPLinear:
    torch.manual_seed(sum(shape))
    layer = TRPLinear.from_linear(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64), **options)
    assert isinstance(layer, TRPLinear)
    return layer


def cut(weight: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """The truncation and U_r V_r^T, with the rank found by adding up one by one."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    total, held, rank = float(values.square().sum()), 0.0, 0
    while held < energy * total:
        held += float(values[rank]) ** 2
        rank += 1
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank], left[:, :rank] @ right[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_cut_is_the_truncation_less_the_subgradient(shape: tuple[int, int]) -> None:
    """1e-12: products of float64 factors of norm about 1."""
    layer = layer_of(shape, nuclear=0.5)
    kept, subgradient = cut(layer.weight.detach(), 0.9)
    layer.prune_(lr=0.1)
    torch.testing.assert_close(layer.weight.detach(), kept - 0.1 * 0.5 * subgradient, atol=1e-12, rtol=0)
    assert torch.linalg.matrix_rank(layer.weight) < min(shape)


@pytest.mark.parametrize("nuclear", [0.0, 0.02])
@pytest.mark.parametrize("every", [1, 3])
def test_twenty_updates_are_those_of_the_published_loop(every: int, nuclear: float) -> None:
    """There: cut before the forward pass, and lambda U_r V_r^T is added to that update's gradient, which is taken
    before the subgradient has moved W; so each cut may set the two apart by lr * (lr lambda sqrt(8)), of second order
    in lr. 1e-9 for the decompositions of matrices that differ in their last digits."""
    choice = TRP(every=every, nuclear=nuclear)
    layer = layer_of((12, 8), every=every, nuclear=nuclear)
    torch.manual_seed(1)
    target, theirs = torch.randn(12, 8, dtype=torch.float64), layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    (event,) = choice.events()
    assert isinstance(event, Event)
    for step in range(1, 21):
        increment = torch.zeros_like(theirs)
        if step > 1 and (step - 1) % every == 0:
            theirs, subgradient = cut(theirs, 0.9)
            increment = nuclear * subgradient
        theirs = theirs - 0.05 * ((theirs - target) + increment)
        optimizer.zero_grad()
        (0.5 * (layer.dense_weight() - target).square().sum()).backward()
        optimizer.step()
        if event.due(step) and step < 20:  # the published loop cuts before an update, so not after the last
            event.run(event.number(step), {"x": layer}, moments_of(optimizer))
    cuts = 19 // every
    assert float((layer.weight.detach() - theirs).norm()) < 1e-9 + cuts * 0.05 * (0.05 * nuclear * 8**0.5)


def test_rank_is_the_least_that_holds_the_energy() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.5])  # squares 4, 1, 1, 0.25 of 6.25
    assert [rank_holding(values, share / 6.25) for share in (3.9, 4.1, 4.9, 5.1, 6.1, 6.25)] == [1, 2, 2, 3, 4, 4]
    assert rank_holding(torch.zeros(3), 0.9) == 1


@pytest.mark.parametrize("option", [{"every": 0}, {"energy": 0.0}, {"energy": 1.1}, {"nuclear": -1.0}])
def test_options_out_of_range_are_refused_by_name(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"strategy.weights.{next(iter(option))}"):
        TRP(**option)  # type: ignore[arg-type]
