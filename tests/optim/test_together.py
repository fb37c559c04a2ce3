"""Small tensors in one launch: the same bits as one by one, and only what belongs together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.optim import moments, together
from lowrank_train.optim.groups import Group
from lowrank_train.optim.moments import Adam, Momentum
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.transform import Slot, Transform

SHAPES = [(7,), (32,), (1,), (5, 3), (), (40, 30)]


def updated(
    rule: Transform, small: int, dtype: torch.dtype, missing: bool = False, **options: Any
) -> tuple[TransformOptimizer, list[Tensor], list[int]]:
    """After four updates: the optimizer, the weights, and how many tensors each call of torch's kernel stepped."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    named = [(str(number), param) for number, param in enumerate(params)]
    slots = [Slot(name, 0, 0.0, dtype) for name, _ in named]
    half = Group("half", rule, named[:1], slots[:1], lr_ratio=0.5)  # steps at another rate
    optimizer = TransformOptimizer([Group("all", rule, named[1:], slots[1:]), half], lr=0.1, **options)
    calls: list[int] = []
    kernel = moments.adamw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "SMALL", small)
        patch.setattr(moments, "adamw", lambda *args, **kwargs: (calls.append(len(args[0])), kernel(*args, **kwargs)))
        for update in range(4):
            for number, param in enumerate(params):
                gradient = torch.randn(param.shape, generator=generator).to(dtype)
                param.grad = None if missing and update == 1 and number == 2 else gradient
            optimizer.step()
    return optimizer, [param.detach() for param in params], calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.3, "weight_decay": 0.2}], ids=str)
def test_same_bits_as_one_by_one(dtype: torch.dtype, decay_first: bool, options: dict[str, Any]) -> None:
    rule = Adam(weight_decay_first=decay_first)
    alone, expected, calls = updated(rule, -1, dtype, **options)
    assert calls == [1] * len(calls) and len(calls) == 4 * len(SHAPES)
    joined, got, calls = updated(rule, 1000, dtype, **options)
    assert sorted(calls) == sorted(4 * [len(SHAPES) - 2, 1, 1])  # the large one and the other rate go by themselves
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(joined.slots, alone.slots, strict=True):
        for key, value in alone.state[theirs].items():
            assert torch.equal(torch.as_tensor(joined.state[ours][key]), torch.as_tensor(value))
    assert joined.stats == alone.stats


def test_tensors_at_other_steps_go_apart() -> None:
    """One had no gradient once, so that its bias correction is another from then on."""
    _, expected, _ = updated(Adam(), -1, torch.float32, missing=True)
    _, got, calls = updated(Adam(), 1000, torch.float32, missing=True)
    assert calls.count(3) == 3 and 4 in calls
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_weights_that_are_not_rounded_to_the_nearest_go_alone() -> None:
    _, expected, _ = updated(Adam(), -1, torch.bfloat16, rounding="stochastic")
    _, got, _ = updated(Adam(), 1000, torch.bfloat16, rounding="stochastic")
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    counted, _, _ = updated(Adam(), 1000, torch.bfloat16, count_lost_updates=True)
    assert counted.stats["lost_updates_pct"] is not None


def test_other_rules_go_alone() -> None:
    _, expected, _ = updated(Momentum(), -1, torch.float32)
    _, got, calls = updated(Momentum(), 1000, torch.float32)
    assert not calls and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
