"""Inner rules against torch's and transformers' own, and the learning-rate schedules against their closed form."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor

from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.groups import Group
from lowrank_train.optim.moments import Adam, Lion, Momentum, RmsProp
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.schedule import multiplier
from lowrank_train.optim.transform import Rates, Slot, Transform, tensor_of

RATES = Rates(1e-2, 1e-2)


SHAPES = [(7, 5), (4, 9), (6, 6), (11,), (2, 3, 4)]  # tall, wide, square, a vector, a stack


def as_transformers(params: list[Tensor], **arguments: Any) -> torch.optim.Optimizer:
    """transformers' Adafactor at the learning rate that is given."""
    return TransformersAdafactor(params, relative_step=False, **arguments)


PAIRS: dict[str, tuple[Transform, Any, dict[str, Any]]] = {
    "adam": (Adam(), torch.optim.AdamW, {}),
    "adam-betas": (Adam((0.8, 0.95), 1e-4), torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-4}),
    "momentum": (Momentum(0.9), torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (Momentum(0.7, True), torch.optim.SGD, {"momentum": 0.7, "nesterov": True}),
    "sgd": (Momentum(0.0), torch.optim.SGD, {}),
    "rmsprop": (RmsProp(), torch.optim.RMSprop, {}),
    "rmsprop-momentum": (
        RmsProp(0.9, 1e-6, 0.8),
        torch.optim.RMSprop,
        {"alpha": 0.9, "eps": 1e-6, "momentum": 0.8},
    ),
    "adafactor": (Adafactor(), as_transformers, {"scale_parameter": False}),
    "adafactor-beta1": (
        Adafactor(beta1=0.9, clip_threshold=0.7, decay_rate=-0.6),
        as_transformers,
        {"scale_parameter": False, "beta1": 0.9, "clip_threshold": 0.7, "decay_rate": -0.6},
    ),
    "adafactor-scaled": (Adafactor(scale_parameter=True), as_transformers, {"scale_parameter": True}),
}
COUPLED = (torch.optim.SGD, torch.optim.RMSprop)  # their weight decay is added to the gradient: left out here


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_library_rule(name: str, shape: tuple[int, ...]) -> None:
    """Twelve updates with a falling learning rate in float64, beside torch's or transformers' own."""
    rule, theirs_of, arguments = PAIRS[name]
    weight_decay = 0.0 if theirs_of in COUPLED else 0.1
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    optimizer = optimizer_of(rule, ours, weight_decay)
    reference = theirs_of([theirs], lr=1e-2, weight_decay=weight_decay, **arguments)
    for update in range(12):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 / (1 + update)
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_lion_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.ones(7, 5, dtype=torch.float64))
    weight, moment = torch.ones(7, 5, dtype=torch.float64), torch.zeros(7, 5, dtype=torch.float64)
    optimizer = optimizer_of(Lion((0.9, 0.99)), param, 0.1)
    for _ in range(12):
        grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * torch.sign(0.9 * moment + 0.1 * grad)
        moment = 0.99 * moment + 0.01 * grad
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), weight, rtol=1e-12, atol=1e-12)
    assert optimizer_of(Lion(), nn.Parameter(torch.ones(3)), 0.0).transforms[0].update(
        torch.zeros(3), {"exp_avg": torch.zeros(3)}, torch.ones(3), RATES
    ).tensor().tolist() == [0.0, 0.0, 0.0]  # the sign of nothing is nothing


def optimizer_of(rule: Transform, param: nn.Parameter, weight_decay: float) -> TransformOptimizer:
    group = Group("rest", rule, [("w", param)], [Slot("w", 0, 0.0, param.dtype)])
    return TransformOptimizer([group], lr=1e-2, weight_decay=weight_decay)


RULES = [Adam(), Momentum(), Momentum(0.9, True), RmsProp(), RmsProp(momentum=0.9), Adafactor(), Adafactor(beta1=0.9)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_moments_narrower_than_the_gradient_are_rounded_not_lost(rule: Transform) -> None:
    """bfloat16 keeps 8 bits of what is stored; the arithmetic between is at least float32, and so is the direction."""
    param = torch.zeros(16, 4, dtype=torch.float32)
    narrow = rule.init(param, Slot("w", 0, 0.0, torch.bfloat16))
    exact_state = rule.init(param, Slot("w", 0, 0.0, torch.float32))
    grad = torch.linspace(-1, 1, 64).reshape(16, 4)
    for _ in range(5):
        rounded, exact = (rule.update(grad, state, param, RATES).tensor() for state in (narrow, exact_state))
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    assert rounded.dtype == torch.float32
    tensors = [value for value in narrow.values() if isinstance(value, Tensor)]
    assert tensors and all(value.dtype == torch.bfloat16 for value in tensors)


@pytest.mark.parametrize("rule", [Lion(), Momentum(), RmsProp(), RmsProp(momentum=0.9), Adafactor()], ids=repr)
def test_a_rounded_moment_is_rounded_once(rule: Transform) -> None:
    """What is stored is the nearest number to the exact average, also where decay and addition cancel."""
    param, key = torch.zeros(64, 8), {"Lion": "exp_avg", "Momentum": "momentum"}.get(type(rule).__name__)
    generator = torch.Generator().manual_seed(3)
    narrow = rule.init(param, Slot("w", 0, 0.0, torch.bfloat16))
    for _ in range(4):
        before = {k: v.float() if isinstance(v, Tensor) else v for k, v in narrow.items()}
        grad = torch.randn(64, 8, generator=generator)
        rule.update(grad, narrow, param, RATES)
        rule.update(grad, before, param, RATES)
    for name in [key] if key else [k for k, v in narrow.items() if isinstance(v, Tensor)]:
        stored, computed = tensor_of(narrow, name), tensor_of(before, name)
        assert torch.equal(stored, computed.to(torch.bfloat16))


@pytest.mark.parametrize("rule", [Adam(), Lion(), Momentum(), RmsProp(), RmsProp(momentum=0.9)], ids=repr)
def test_a_permutation_of_the_basis_permutes_the_moments(rule: Transform) -> None:
    """Coordinates in another order: going on after `rotate` is the same as having had that order from the start."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(6, generator=generator)

    def change(low: Tensor, *, squared: bool = False) -> Tensor:
        return low[order]

    param = torch.zeros(6, 4, dtype=torch.float64)
    slot = Slot("w", 0, 0.0, torch.float64)
    turned, straight = rule.init(param, slot), rule.init(param, slot)
    for update in range(6):
        grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        if update == 3:
            rule.rotate(turned, change)
        direction = rule.update(grad if update < 3 else grad[order], turned, param, RATES).tensor()
        expected = rule.update(grad, straight, param, RATES).tensor()
        torch.testing.assert_close(direction, expected if update < 3 else expected[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "arguments", "named"),
    [
        (Adam, {"betas": (1.0, 0.9)}, "betas[0]"),
        (Adam, {"betas": (0.9, -0.1)}, "betas[1]"),
        (Adam, {"eps": 0.0}, "eps"),
        (Lion, {"betas": (0.9, 1.0)}, "betas[1]"),
        (Momentum, {"momentum": 1.0}, "momentum"),
        (Momentum, {"momentum": 0.0, "nesterov": True}, "nesterov"),
        (RmsProp, {"beta": 1.5}, "beta"),
        (RmsProp, {"momentum": -0.1}, "momentum"),
        (RmsProp, {"eps": -1e-8}, "eps"),
        (Adafactor, {"eps": (-1e-30, 1e-3)}, "eps"),
        (Adafactor, {"clip_threshold": 0.0}, "clip_threshold"),
        (Adafactor, {"decay_rate": 0.8}, "decay_rate"),
        (Adafactor, {"beta1": 1.0}, "beta1"),
    ],
)
def test_what_a_rule_refuses(rule: Any, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{rule.__name__}'s {named} is")):
        rule(**arguments)


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
