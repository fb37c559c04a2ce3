"""Adam against torch's own, over several updates, and the learning-rate schedules against their closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_train.optim.moments import Adam
from lowrank_train.optim.optimizer import Group, TransformOptimizer
from lowrank_train.optim.schedule import multiplier
from lowrank_train.optim.transform import Rates, Slot

RATES = Rates(1e-2, 1e-2)


def test_adam_is_torchs_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(7, 5, dtype=torch.float64)) for _ in range(2))
    group = Group("rest", Adam(), [("w", ours)], [Slot("w", 0, 0.0, torch.float64)])
    optimizer = TransformOptimizer([group], lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(12):
        grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_moments_narrower_than_the_gradient_are_rounded_not_lost() -> None:
    param, adam = torch.zeros(64, dtype=torch.float32), Adam()
    narrow = adam.init(param, Slot("w", 0, 0.0, torch.bfloat16))
    wide = adam.init(param, Slot("w", 0, 0.0, torch.float32))
    grad = torch.linspace(-1, 1, 64)
    for _ in range(5):
        rounded, exact = (adam.update(grad, state, param, RATES).tensor() for state in (narrow, wide))
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)  # bfloat16 keeps 8 bits
    assert narrow["exp_avg"].dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": 0.0}])
def test_adam_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Adam(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.0),
        ("cosine", 5, 0.5),
        ("cosine", 10, 1.0),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("cosine", 500, 0.1),
        ("linear", 60, 0.55),
        ("linear", 85, 0.325),
        ("constant", 5, 0.5),
        ("constant", 99, 1.0),
    ],
)
def test_schedule(schedule: str, step: int, expected: float) -> None:
    value = multiplier(schedule, step, warmup_steps=10, steps=110, min_lr_ratio=0.1)  # type: ignore[arg-type]
    assert value == pytest.approx(expected, abs=1e-12)


def test_schedule_without_warmup_starts_at_the_full_rate() -> None:
    assert multiplier("cosine", 0, warmup_steps=0, steps=10) == 1.0
