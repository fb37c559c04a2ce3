"""Blocks: who changes and who sleeps, what is freed, and what a resumed run goes on with."""

from __future__ import annotations

import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.optim.activity import is_asleep
from lowrank_train.optim.blocks import Blocks
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.strategy import Strategy
from tests.optim.methods import BACKPROJECT, LAYERS, in_blocks, optimizer_of, run_update, subspace, toy_model, weights

ADAMW = {"_target_": "lowrank_train.optim.moments.Adam"}


class Decoder(nn.Module):
    """Layers of one size between an embedding and a head, named as in a LLaMA."""

    def __init__(self, layers: int = 4, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(12, width, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.float64) for _ in range(layers))
        self.head = nn.Linear(width, 7, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs.double())
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        result: Tensor = self.head(hidden)
        return result.float()


def layer_config(freeze_rest: bool = True, **keys: Any) -> StrategyConfig:
    schedule = {"_target_": "lowrank_train.optim.blocks.BlockSchedule", "every": 3, "count": 1} | keys
    return StrategyConfig(
        name="badam", select=["layers.*"], inner=ADAMW, rest=ADAMW, blocks=schedule, freeze_rest=freeze_rest
    )


def awake(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def layer_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("layers.")}


def changed_by_update(model: nn.Module, optimizer: TransformOptimizer, update: int) -> set[str]:
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    run_update(model, optimizer, update)
    return {name for name, param in model.named_parameters() if not torch.equal(before[name], param)}


@pytest.mark.parametrize("when", ["after_backward", "in_backward"])
@pytest.mark.parametrize("parts", [{}, {"subspace": subspace("svd"), "lift": BACKPROJECT}], ids=["adam", "galore"])
def test_all_blocks_always_active_is_the_rule_itself(parts: dict[str, Any], when: str) -> None:
    results = []
    for blocks in (True, False):
        config = in_blocks(patterns=LAYERS, count=3, on_switch="keep", **parts)()
        config.blocks = config.blocks if blocks else None
        model = toy_model()
        optimizer = optimizer_of(config, model, when=when, weight_decay=0.1)
        for update in range(10):
            run_update(model, optimizer, update)
        results.append(weights(model))
    assert torch.equal(*results)


def test_lisa_with_all_layers_and_no_state_drop_is_adamw() -> None:
    model, reference = Decoder(), Decoder()
    config = layer_config(freeze_rest=False, count=4, order="uniform", on_switch="keep")
    optimizer = optimizer_of(config, model, weight_decay=0.1)
    adamw = optimizer_of(StrategyConfig(name="full", rest=ADAMW), reference, weight_decay=0.1)
    for update in range(8):
        run_update(model, optimizer, update)
        run_update(reference, adamw, update)
    assert torch.equal(weights(model), weights(reference))
    reset = Decoder()
    optimizer = optimizer_of(layer_config(freeze_rest=False, count=4), reset, weight_decay=0.1)
    for update in range(8):
        run_update(reset, optimizer, update)
    assert not torch.equal(weights(reset), weights(reference))


@pytest.mark.parametrize("when", ["after_backward", "in_backward"])
def test_only_one_layer_changes_and_all_do_in_a_sweep(when: str) -> None:
    """Weight decay must not touch the others either; the rest is frozen; a layer keeps its whole interval."""
    model = Decoder()
    optimizer = optimizer_of(layer_config(), model, when=when, weight_decay=0.1)
    visits: list[str] = []
    for update in range(12):
        expected = awake(model)
        assert len(expected) == 2  # weight and bias of one layer
        changed = changed_by_update(model, optimizer, update)
        assert changed == expected
        visits.append(*layer_of(changed))
    turns = [visits[start : start + 3] for start in range(0, 12, 3)]
    assert all(len(set(turn)) == 1 for turn in turns)
    assert {turn[0] for turn in turns} == {"0", "1", "2", "3"}


def test_lisa_trains_the_rest_always() -> None:
    model = Decoder()
    optimizer = optimizer_of(layer_config(freeze_rest=False, count=2, order="uniform"), model, weight_decay=0.1)
    drawn = set()
    for update in range(30):
        changed = changed_by_update(model, optimizer, update)
        assert {name for name in changed if not name.startswith("layers.")} == {
            f"{part}.{tensor}" for part in ("embed", "head") for tensor in ("weight", "bias")
        }
        assert len(layer_of(changed)) == 2
        drawn |= layer_of(changed)
    assert drawn == {"0", "1", "2", "3"}


def test_accumulation_keeps_a_block_for_the_whole_window() -> None:
    whole, parts = Decoder(), Decoder()
    one = optimizer_of(layer_config(every=1), whole)
    four = optimizer_of(layer_config(every=1), parts, micro_batches=4)
    for update in range(8):
        run_update(whole, one, update)
        run_update(parts, four, update, 4)
    assert torch.allclose(weights(whole), weights(parts), rtol=0, atol=1e-7)  # the model's output is float32


def test_a_gradient_handed_to_a_sleeping_tensor_is_ignored() -> None:
    model = Decoder()
    optimizer = optimizer_of(layer_config(), model, weight_decay=0.1)
    for param in model.layers.parameters():
        param.grad = torch.ones_like(param)
    expected = awake(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    assert {name for name, param in model.named_parameters() if not torch.equal(before[name], param)} == expected


def test_state_is_freed_and_the_bytes_stay_the_same() -> None:
    model = Decoder()
    optimizer = optimizer_of(layer_config(every=2), model)
    run_update(model, optimizer, 0)
    one_layer = {"exp_avg": 8 * (36 + 6), "exp_avg_sq": 8 * (36 + 6)}
    assert optimizer.state_bytes() == one_layer
    for update in range(1, 9):
        old = [weakref.ref(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        run_update(model, optimizer, update)
        assert optimizer.state_bytes() == one_layer
        assert len(old) == 4
        assert all(param.grad is None for param in model.parameters() if not param.requires_grad)
        assert all((tensor() is None) == (update % 2 == 1) for tensor in old)
    saved = optimizer.state_dict()["state"].values()
    assert sum(isinstance(value, Tensor) for state in saved for value in state.values()) == 4


def test_a_tensor_that_comes_back_starts_afresh() -> None:
    """After a sweep the moments of a layer are those of its new interval alone: the step counts from 1 again."""
    model = Decoder(layers=2)
    optimizer = optimizer_of(layer_config(every=3, order="ascending"), model)
    for update in range(7):
        run_update(model, optimizer, update)
    weight = next(model.layers[0].parameters())
    state, grad = optimizer.state[weight], weight.grad
    assert state["step"] == 1
    assert grad is not None
    torch.testing.assert_close(state["exp_avg"], 0.1 * grad, rtol=1e-12, atol=0)


def test_a_random_basis_is_another_one_at_every_visit() -> None:
    gaussian = {"_target_": "lowrank_train.optim.subspace.random.Gaussian", "rank": 3, "every": 4}
    model = toy_model()
    config = in_blocks(subspace=gaussian, lift=BACKPROJECT, count=3)()
    optimizer = optimizer_of(config, model)
    bases = []
    for update in range(8):
        run_update(model, optimizer, update)
        if update % 4 == 0:
            state = optimizer.state[model[2].weight]  # type: ignore[index]
            assert state["refreshes"] == 1
            bases.append(next(value.clone() for key, value in state.items() if key.startswith("basis")))
    assert not torch.equal(*bases)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_resumed_run_has_the_same_layers_awake(stop: int) -> None:
    model = Decoder()
    optimizer = optimizer_of(layer_config(), model)
    for update in range(stop):
        run_update(model, optimizer, update)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Decoder()
    resumed.load_state_dict(saved["model"])
    fresh = optimizer_of(layer_config(), resumed)
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.state_bytes() == optimizer.state_bytes()
    for update in range(stop, stop + 6):
        assert awake(resumed) == awake(model)
        run_update(model, optimizer, update)
        run_update(resumed, fresh, update)
    assert torch.equal(weights(model), weights(resumed))


def test_an_update_without_a_gradient_or_with_a_bad_one_counts() -> None:
    """The tensors of a block must stay in step with each other, whatever happens to one of them."""
    model = Decoder()
    optimizer = optimizer_of(layer_config(every=2), model)
    spoilt = next(param for param in model.layers.parameters() if param.requires_grad)
    handle = spoilt.register_hook(lambda grad: grad * float("nan"))
    run_update(model, optimizer, 0)
    handle.remove()
    assert optimizer.stats["skipped_tensors"] == 1
    optimizer.zero_grad()
    optimizer.step()
    assert {state["updates_seen"] for state in optimizer.state.values()} == {2}
    assert len(layer_of(awake(model))) == 1
    assert not spoilt.requires_grad


def test_what_sleeps_is_trained_by_the_next_optimizer() -> None:
    """An optimizer that goes by requires_grad would never train what slept when it was built."""
    model = Decoder()
    model.head.bias.requires_grad_(False)
    optimizer_of(layer_config(), model)
    assert is_asleep(model.embed.weight)
    second = optimizer_of(StrategyConfig(name="full", rest=ADAMW), model)
    everything = {name for name, _ in model.named_parameters()}
    assert awake(model) == everything - {"head.bias"}
    assert changed_by_update(model, second, 0) == everything - {"head.bias"}


@pytest.mark.parametrize("freeze_rest", [True, False])
def test_the_assignment_is_the_same_before_and_after(freeze_rest: bool) -> None:
    model = Decoder()
    model.head.bias.requires_grad_(False)
    strategy = Strategy.from_config(layer_config(freeze_rest=freeze_rest), seed=1)
    before = strategy.assignment(model)
    optimizer = strategy.optimizer(model, lr=1e-2)
    assert strategy.assignment(model) == before
    for update in range(4):
        run_update(model, optimizer, update)
    assert strategy.assignment(model) == before
    role = {row.name: row.role for row in before}
    assert role["head.bias"] == "frozen"
    assert role["embed.weight"] == ("frozen" if freeze_rest else "rest")
    assert {role[name] for name in role if name.startswith("layers.")} == {"selected"}
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name in role if role[name] != "frozen"}
    assert sum(row.state_bytes for row in before) == sum(optimizer.state_bytes().values())


def test_the_library_entry_point() -> None:
    model = Decoder()
    optimizer = lowrank_train.optimizer("badam", model, lr=1e-2, switch_block_every=2, active_modules=["head"])
    assert isinstance(optimizer, TransformOptimizer)
    assert isinstance(optimizer.transforms[0], Blocks)
    assert len(layer_of(awake(model))) == 1
    assert awake(model) - {name for name in awake(model) if "layers" in name} == {"head.weight", "head.bias"}
    lowrank_train.optimizer("lisa", model, lr=1e-2, lisa_activated_layers=3, lisa_interval_steps=5)
    assert len(layer_of(awake(model))) == 3
    assert {"embed.weight", "head.weight"} < awake(model)
    lowrank_train.optimizer("frugal_block", model, lr=1e-2, project=["layers.*.weight"], density=0.5)
    assert awake(model) == {name for name, _ in model.named_parameters()}
    for published, order in ((True, "uniform"), (False, "random")):
        built = lowrank_train.optimizer(
            "frugal_block", model, lr=1e-2, project=["layers.*.weight"], published=published, block_order="random"
        )
        rule = built.transforms[0]
        assert isinstance(rule, Blocks)
        assert rule.schedule.order == order
    with pytest.raises(ValueError, match="switch_mode is 'fixed'"):
        lowrank_train.optimizer("badam", model, lr=1e-2, switch_mode="fixed")
