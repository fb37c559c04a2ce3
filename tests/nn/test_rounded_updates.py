"""Representations in bfloat16 whose parameters lose no update: events that change weights or their form, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.reparam import layers_of
from lowrank_train.strategy import Strategy
from tests.nn.methods import METHODS, Method, Toy, train, weights

narrow = [method for method in METHODS if torch.bfloat16 in method.dtypes]


def built(method: Method, rounding: Rounding) -> tuple[Toy, Strategy, Any]:
    model = Toy(torch.bfloat16)
    strategy = Strategy.from_config(method.config(), seed=7, rounding=rounding)
    strategy.prepare(model)
    return model, strategy, strategy.optimizer(model, lr=0.02)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("method", narrow, ids=str)
def test_resumes_exactly_between_events(method: Method, rounding: Rounding, tmp_path: Path) -> None:
    if method.weights.get("dropout"):
        pytest.skip("dropout draws from the global generator, whose state the run saves")
    if method.name == "int8" and rounding == "compensated":
        pytest.skip("8-bit codes keep no residue, which is refused: tests/optim/test_int8_weights.py")
    model, strategy, optimizer = built(method, rounding)
    middle = method.steps // 2
    train(model, strategy, optimizer, range(1, middle + 1))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, strategy, optimizer, range(middle + 1, method.steps + 1))
    again, strategy_again, optimizer_again = built(method, rounding)
    found = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(found["model"])
    strategy_again.regroup(again, optimizer_again)
    optimizer_again.load_state_dict(found["optimizer"])
    train(again, strategy_again, optimizer_again, range(middle + 1, method.steps + 1))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert all(value.isfinite().all() for value in expected.values() if value.is_floating_point())


@pytest.mark.parametrize("moments", ["keep", "fresh", "magnitude"])
def test_a_merge_makes_residues_of_what_it_changes_void(moments: str) -> None:
    """B begins anew at zero, and nothing of the old B comes back with the next update; others keep theirs."""
    method = Method("relora", weights("lora.LoRA", rank=3, rounding="compensated"), {"every": 4, "moments": moments})
    model, strategy, optimizer = built(method, "compensated")
    train(model, strategy, optimizer, range(1, 4))
    layer = layers_of(model)["tall"]
    trained = {name: param for name, param in layer.named_parameters() if param.requires_grad}
    assert trained and all(optimizer.state_of(param)["residue"].any() for param in trained.values())
    train(model, strategy, optimizer, range(4, 5))
    assert not any("residue" in optimizer.state_of(param) for param in trained.values())
    assert optimizer.state_of(model.head.weight)["residue"].any()
