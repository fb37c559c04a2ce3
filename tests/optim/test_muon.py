"""Muon beside torch's, the identities of orthogonalisation, and AuON against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.config import UserError
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.optim.groups import Group
from lowrank_train.optim.muon import Auon, Muon
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.transform import Rates, Slot, Transform
from tests.optim.methods import optimizer_of, toy_model

SHAPES = [(20, 6), (6, 20), (12, 12), (7, 5)]  # tall, wide, square, odd
RATES = Rates(1e-2, 1e-2)


def slot(dtype: torch.dtype = torch.float64) -> Slot:
    return Slot("w", 0, 0.0, dtype)


def after_updates(
    rule: Transform, shape: tuple[int, int], dtype: torch.dtype, theirs: Any = None
) -> tuple[Tensor, ...]:
    """The weights after 12 updates with our rule, and with theirs."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(2)]
    groups = [Group("projected", rule, [("w", params[0])], [slot(dtype)])]
    optimizers = [TransformOptimizer(groups, lr=1e-2, weight_decay=0.1), theirs([params[1]])]
    for _ in range(12):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    return params[0].detach(), params[1].detach()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_is_torchs(shape: tuple[int, int], adjust: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch iterates in bfloat16; with that taken away both are float64. They guard against a zero norm differently,
    by at least and by plus 1e-7, which five steps leave at 1e-6 of an update."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    ours, theirs = after_updates(
        Muon(adjust_lr=adjust, nesterov=nesterov, precision="wide"),
        shape,
        torch.float64,
        lambda params: torch.optim.Muon(params, lr=1e-2, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust),
    )
    displacement = (theirs - 1).norm()
    assert (ours - theirs).norm() / displacement < 1e-6


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=str)
def test_muon_in_bfloat16_is_torchs_to_its_rounding(shape: tuple[int, int]) -> None:
    ours, theirs = after_updates(
        Muon(adjust_lr="original"), shape, torch.float32, lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1)
    )
    error = (ours - theirs).norm() / (theirs - 1).norm()
    assert 0 < error < 1e-2  # products of 64 terms with 8 bits


@pytest.mark.parametrize("shape", [*SHAPES, (200, 100)], ids=str)
def test_singular_values_are_brought_near_one(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rule = Muon(adjust_lr="none", precision="wide")
    direction = rule.update(grad, rule.init(grad, slot()), grad, RATES).tensor()
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    turned = left.T @ direction @ right.T  # diagonal: the singular vectors stay
    values = turned.diagonal()
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(turned, values.diag(), rtol=0, atol=1e-10)


def test_an_update_is_as_large_as_one_of_adamw() -> None:
    """0.2 sqrt(max(M, N)) makes the root mean square of an update 0.2 to 0.25, which is what AdamW's settles at."""
    for shape in [(60, 60), (60, 20), (20, 60)]:
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        rule = Muon(precision="wide")
        rms = rule.update(grad, rule.init(grad, slot()), grad, RATES).tensor().square().mean().sqrt()
        assert rms == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("rule", [Muon(precision="wide"), Muon(nesterov=False, precision="wide")], ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_turns_with_its_basis(rule: Transform, shape: tuple[int, int]) -> None:
    """Coordinates in another orthonormal basis: `rotate`, then the same run in the new coordinates."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64)).Q
    like = torch.zeros(shape, dtype=torch.float64)
    turned, straight = rule.init(like, slot()), rule.init(like, slot())

    def change(low: Tensor, *, squared: bool = False) -> Tensor:
        return turn @ low

    for update in range(6):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        if update == 3:
            rule.rotate(turned, change)
        direction = rule.update(grad if update < 3 else turn @ grad, turned, like, RATES).tensor()
        expected = rule.update(grad, straight, like, RATES).tensor()
        torch.testing.assert_close(direction, expected if update < 3 else turn @ expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auon_is_its_formula(shape: tuple[int, int], form: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    gamma = {"code": 1.5, "paper": 1.0}[form]
    rule = Auon(form=form, gamma=gamma)
    state = rule.init(torch.zeros(shape, dtype=torch.float64), slot())
    momentum = torch.zeros(shape, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        momentum = 0.95 * momentum + 0.05 * grad
        blend = 0.05 * grad + 0.95 * momentum
        unit = blend / blend.norm()
        brake = math.sqrt(sum(math.cosh(gamma * x) ** 2 for x in unit.flatten().tolist()) / unit.numel())
        expected = blend / brake if form == "code" else math.sqrt(max(1, shape[0] / shape[1])) * unit / brake
        direction = rule.update(grad, state, grad, RATES).tensor()
        torch.testing.assert_close(direction, expected, rtol=1e-6, atol=1e-8)  # 1e-7 and 1e-8 against empty norms


@pytest.mark.parametrize("rule", [Muon(), Auon(), Auon(form="paper")], ids=repr)
def test_zero_gradient_moves_nothing(rule: Transform) -> None:
    zero = torch.zeros(6, 4)
    assert torch.equal(rule.update(zero, rule.init(zero, slot(torch.float32)), zero, RATES).tensor(), zero)


@pytest.mark.parametrize("rule", ["Muon", "Auon"])
def test_what_is_no_matrix_is_refused(rule: str) -> None:
    part = {"_target_": f"lowrank_train.optim.muon.{rule}"}
    with pytest.raises(UserError, match=r"0\.bias of shape \(20,\).*matrices alone"):
        optimizer_of(StrategyConfig(name="x", select=["*"], inner=part, rest=part), toy_model())
    with pytest.raises(UserError, match=r"0\.bias of shape \(20,\).*strategy\.rest"):
        optimizer_of(StrategyConfig(name="x", select=["*.weight"], inner=part, rest=part), toy_model())


@pytest.mark.parametrize(
    ("rule", "arguments", "named"),
    [(Muon, {"momentum": 1.0}, "momentum"), (Muon, {"steps": 0}, "steps"), (Auon, {"gamma": 0.0}, "gamma")],
)
def test_what_muon_and_auon_refuse(rule: Any, arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"{rule.__name__}'s {named} is"):
        rule(**arguments)
