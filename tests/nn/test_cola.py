"""Chain of LoRA: one link is LoRA, and a second one is LoRA again on the exported model, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_train.config import compose
from lowrank_train.nn.reparam import layers_of
from lowrank_train.strategy import Strategy
from tests.nn.methods import Method, Toy, train, weights

LINK = 5  # updates


def chain(merged: bool) -> Strategy:
    """conf/strategy/cola.yaml for the toy, or the same without merges."""
    config = compose(["recipe=null", "task=explain", "strategy=cola"]).strategy
    assert config.weights is not None and config.merge is not None
    small = weights("lora.LoRA", rank=3, rounding="compensated")
    merge = {**config.merge, "every": LINK} if merged else None
    settings = {**vars(config), "weights": {**config.weights, **small}, "merge": merge}
    return Strategy.from_config(type(config)(**settings), seed=7)


def trained(strategy: Strategy, model: Toy, steps: range) -> dict[str, Tensor]:
    strategy.prepare(model)
    train(model, strategy, strategy.optimizer(model, lr=0.02), steps)
    return {name: value.clone() for name, value in strategy.dense_state_dict(model).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_one_link_is_lora() -> None:
    """Before its merge in every tensor, and after it in the dense weights that are exported."""
    ends = []
    for merged in (True, False):
        model, strategy = Toy(), chain(merged)
        strategy.prepare(model)
        train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, LINK))
        ends.append(dict(model.state_dict()))
    assert_same(*ends)
    assert_same(trained(chain(True), Toy(), range(1, LINK + 1)), trained(chain(False), Toy(), range(1, LINK + 1)))


def test_two_links_are_lora_on_the_export_of_lora() -> None:
    """The second run begins from the merged export with the A that the chain drew, and a new optimizer."""
    model, strategy = Toy(), chain(True)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.02)
    train(model, strategy, optimizer, range(1, LINK + 1))
    drawn = {name: layer.get_parameter("lora_A").detach().clone() for name, layer in layers_of(model).items()}
    train(model, strategy, optimizer, range(LINK + 1, 2 * LINK + 1))

    exported = trained(chain(False), Toy(), range(1, LINK + 1))
    second, alone = Toy(), chain(False)
    second.load_state_dict(exported)
    alone.prepare(second)
    for name, layer in layers_of(second).items():
        assert not torch.equal(layer.get_parameter("lora_A"), drawn[name])  # another link, another draw
        with torch.no_grad():
            layer.get_parameter("lora_A").copy_(drawn[name])
    train(second, alone, alone.optimizer(second, lr=0.02), range(LINK + 1, 2 * LINK + 1))
    assert_same(dict(strategy.dense_state_dict(model)), dict(alone.dense_state_dict(second)))
    changed = {name for name, value in Toy().state_dict().items() if not torch.equal(value, exported[name])}
    assert changed == {"tall.weight", "square.weight", "wide.weight"}  # embeddings, norms and the head are frozen


def test_keeping_the_step_count_would_be_another_run() -> None:
    """moments=fresh begins a link with steps of lr, as a new AdamW does; moments=zero with (1 - b1) / c1 of it over the
    root of (1 - b2) / c2, c = 1 - b^21, since the bias correction goes on: 0.512 here, 3.16 late in a run. 1 %: eps."""
    moved = {}
    for moments in ("fresh", "zero"):
        method = Method("cola", weights("lora.LoRA", rank=3), merge={"every": 20, "moments": moments})
        model, strategy = Toy(), method.strategy()
        strategy.prepare(model)
        optimizer = strategy.optimizer(model, lr=0.001)
        train(model, strategy, optimizer, range(1, 22))
        moved[moments] = model.get_submodule("tall").get_parameter("lora_B").detach().abs().median().item()
    continued = (0.1 / (1 - 0.9**21)) / (0.001 / (1 - 0.999**21)) ** 0.5
    assert moved["fresh"] == pytest.approx(0.001, rel=0.01)
    assert moved["zero"] == pytest.approx(0.001 * continued, rel=0.01)
