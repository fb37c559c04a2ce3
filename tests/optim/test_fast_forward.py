"""Fast Forward on parameters whose way is known by hand: how often the last update is repeated, and what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.config.schema import StrategyConfig
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.fast_forward import FastForward
from lowrank_train.strategy import Strategy
from tests.nn.methods import ADAMW, Toy, batch_of

SGD = {"_target_": "lowrank_train.optim.moments.Momentum", "momentum": 0.0}
PART = {"_target_": "lowrank_train.optim.fast_forward.FastForward"}
TARGET = 0.99


class One(nn.Module):
    """A matrix of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))


def built(rule: dict[str, Any] = SGD, **options: Any) -> tuple[One, Any, Strategy]:
    """A matrix of zeros that is pulled to TARGET, 0.1 of the way with every update, for |W - TARGET|^2 / 2."""
    model = One()
    config = StrategyConfig(name="x", rest=rule, repeat={**PART, **options})
    strategy = Strategy.from_config(config)
    return model, strategy.optimizer(model, lr=0.1), strategy


def update(model: One, optimizer: Any) -> None:
    optimizer.zero_grad()

    def closure() -> Tensor:
        loss: Tensor = (model.matrix - TARGET).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)


def distance(model: One) -> Callable[[], float]:
    return lambda: float((model.matrix - TARGET).abs().max())


def test_repeats_the_update_until_the_rows_get_no_easier() -> None:
    """After two updates W = 0.19 t and D = 0.09 t for the target t: 9 times D is t itself, a tenth leads away. Then
    every second update anew, from where it stands; state and weights elsewhere are as without. 1e-12: a dozen sums."""
    model, optimizer, strategy = built(every=2)
    update(model, optimizer)
    assert strategy.run_events(1, model, optimizer) == []  # not due, and no loss needed
    update(model, optimizer)
    with torch.no_grad():
        torch.testing.assert_close(model.matrix, torch.full_like(model.matrix, 0.19 * TARGET), atol=1e-12, rtol=0)
    [event] = strategy.run_events(2, model, optimizer, held_out_loss=distance(model))
    assert event.name == "update repeated x9" and not event.quiet
    torch.testing.assert_close(model.matrix.detach(), torch.full_like(model.matrix, TARGET), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ([1.0, 1.0], 0),
        ([1.0, 2.0], 0),
        ([1.0, math.nan], 0),
        ([math.nan, 0.5], 0),
        ([5.0, 4.0, 3.0, 3.5], 2),
        ([9.0, 8.0, 7.0, 6.0], 3),
    ],
)
def test_what_did_not_help_is_taken_back_to_the_bit(losses: list[float], count: int) -> None:
    """With at most 3 repetitions; W + k D from W itself, so that taking back the last leaves no rounding behind."""
    model, optimizer, strategy = built(every=1, most=3)
    update(model, optimizer)
    update(model, optimizer)
    end = model.matrix.detach().clone()
    line = end - optimizer.previous.kept[model.matrix]
    told = iter(losses)
    happened = strategy.run_events(1, model, optimizer, held_out_loss=lambda: next(told))
    assert [event.name for event in happened] == ([f"update repeated x{count}"] if count else [])
    assert torch.equal(model.matrix.detach(), torch.add(end, line, alpha=count) if count else end)


@pytest.mark.parametrize("when", ["after_backward", "in_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goes_along_the_last_change_of_everything_trained(when: Any, dtype: torch.dtype) -> None:
    """Of a model with LoRA layers: the factors, the embedding, the norm and the head; W0 stays. In bfloat16 W + k D is
    rounded once, whatever k."""
    model = Toy(dtype)
    layer = {"_target_": "lowrank_train.nn.lora.LoRA", "rank": 3, "modules": ["tall", "wide", "square"]}
    config = StrategyConfig(name="x", weights=layer, rest=ADAMW, when=when, repeat={**PART, "every": 3, "most": 4})
    strategy = Strategy.from_config(config, seed=1)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.01)
    history = []
    for step in range(1, 4):

        def closure(step: int = step) -> Tensor:
            loss = nn.functional.cross_entropy(model(batch_of(step)).flatten(0, 1).float(), batch_of(step).flatten())
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
        history.append({name: value.detach().clone() for name, value in model.named_parameters()})
    told = iter([5.0, 4.0, 3.0, 2.0, 1.0])
    strategy.run_events(3, model, optimizer, held_out_loss=lambda: next(told))
    moved = set()
    for name, param in model.named_parameters():
        before, end = history[1][name], history[2][name]
        expected = torch.add(end.float(), (end - before).float(), alpha=4).to(dtype)
        assert torch.equal(param, expected), name
        moved |= {name} if not torch.equal(param, end) else set()
    assert {"embedding.weight", "norm.weight", "head.weight", "tall.lora_A", "square.lora_B"} <= moved
    assert not moved & {f"{name}.weight" for name in layers_of(model)}


def test_the_copy_is_counted_before_it_exists() -> None:
    """One number more for each that is trained, in the assignment and on the meta device."""
    model, optimizer, strategy = built(ADAMW)
    [row] = strategy.assignment(model)
    optimizer.initialize()
    assert row.state_bytes == sum(optimizer.state_bytes().values()) == 3 * 6 * 8
    assert optimizer.state_bytes()["before"] == 6 * 8
    assert all("before" not in state for state in optimizer.state_dict()["state"].values())


def test_asks_for_a_loss_and_an_optimizer_of_its_own() -> None:
    model, optimizer, strategy = built(every=1)
    update(model, optimizer)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    for asked, loss in ((optimizer, None), (plain, distance(model))):
        with pytest.raises(ValueError, match=r"strategy\.repeat goes with strategy\.optimizer"):
            strategy.run_events(1, model, asked, held_out_loss=loss)


@pytest.mark.parametrize("name", ["every", "rows", "most"])
def test_bad_values_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.repeat\.{name} is 0; it must be at least 1"):
        FastForward(**{name: 0})
