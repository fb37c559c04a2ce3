"""What holds for every representation: it computes what it stands for, folds without loss, resumes and exports."""

from __future__ import annotations

import copy
from io import BytesIO
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_train.nn.reparam import layers_of
from tests.nn.methods import METHODS, Method, Toy, batch_of, train


def built(method: Method, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Toy, Any, Any]:
    model, strategy = Toy(dtype), method.strategy(**changes)
    strategy.prepare(model)
    return model, strategy, strategy.optimizer(model, lr=0.02)


def states(model: Toy, optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(model.state_dict())
    for param, slot in optimizer.slots.items():
        found |= {f"{slot.name}/{key}": value for key, value in optimizer.state.get(param, {}).items()}
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_computes_what_it_folds_into(method: Method) -> None:
    """The dense weight, after training through every event; and a plain model, a step before the last of them.

    Exported weights load strictly into the plain architecture. 1e-5: float32 sums of 20 terms of size 1, in any order.
    """
    model, strategy, optimizer = built(method)
    train(model, strategy, optimizer, range(1, method.steps))
    plain = Toy()
    plain.load_state_dict(strategy.dense_state_dict(model), strict=True)
    torch.testing.assert_close(plain.eval()(batch_of(99)), model.eval()(batch_of(99)), atol=1e-5, rtol=1e-4)
    train(model.train(), strategy, optimizer, range(method.steps, method.steps + 1))
    for training in (True, False) if method.same_in_training else (False,):
        model.train(training)
        for layer in layers_of(model).values():
            x = torch.randn(4, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
            expected = F.linear(x, layer.dense_weight(), layer.bias)
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m.keeps_weight], ids=str)
def test_begins_with_the_matrix_it_was_built_from(method: Method) -> None:
    """What a pre-trained model needs. 1e-6: float32 decompositions of matrices of norm about 2."""
    plain = Toy()
    model, _, _ = built(method)
    for name, layer in layers_of(model).items():
        weight = plain.get_submodule(name).weight
        torch.testing.assert_close(layer.dense_weight(), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [m for m in METHODS if m.merge is not None], ids=str)
def test_a_fold_changes_no_logit(method: Method) -> None:
    """The promise of every merge, 1e-5 in float32; and the layer goes on with something else."""
    model, strategy, optimizer = built(method)
    train(model, strategy, optimizer, range(1, 4))
    model.eval()
    before, weights = model(batch_of(99)), copy.deepcopy(model.state_dict())
    for layer in layers_of(model).values():
        layer.fold_(1)
    torch.testing.assert_close(model(batch_of(99)), before, atol=1e-5, rtol=0)
    began = getattr(strategy.weights, "begins_after_steps", 0) <= 3
    assert not began or any(not torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("when", ["after_backward", "in_backward"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resumes_exactly_at_any_step(method: Method, when: str) -> None:
    """Saved after every update, read back with weights_only=True into fresh objects.

    They make the next update; those that begin after the first go on to the end, through every event. Both moments of
    stepping come to the same states, as the next test shows: one resumes after odd updates, the other after even ones.
    """
    if method.weights.get("dropout"):
        pytest.skip("dropout draws from the global generator, whose state the run saves")
    model, strategy, optimizer = built(method, when=when)
    saved, expected = {}, {}

    def save(step: int) -> None:
        file = BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        saved[step], expected[step] = file.getvalue(), copy.deepcopy(states(model, optimizer))

    train(model, strategy, optimizer, range(1, method.steps + 1), save)
    for step in (1, *range(2 if when == "in_backward" else 3, method.steps, 2)):
        again, strategy_again, optimizer_again = built(method, when=when)
        found = torch.load(BytesIO(saved[step]), weights_only=True)
        again.load_state_dict(found["model"])
        strategy_again.regroup(again, optimizer_again)
        optimizer_again.load_state_dict(found["optimizer"])
        last = method.steps if step == 1 else step + 1
        train(again, strategy_again, optimizer_again, range(step + 1, last + 1))
        assert_equal(states(again, optimizer_again), expected[last])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_moments_of_stepping_agree_and_every_draw_comes_from_the_seed(method: Method) -> None:
    """Stepping inside the backward pass is the same arithmetic in another order.

    Two ranks that never talk hold the same numbers, whatever the global generators have done.
    """
    ends = []
    for noise, when in ((1, "after_backward"), (2, "in_backward")):
        model, strategy, optimizer = built(method, when=when)
        torch.manual_seed(noise if not method.weights.get("dropout") else 0)
        train(model, strategy, optimizer, range(1, method.steps + 1))
        ends.append(states(model, optimizer))
    assert_equal(ends[1], ends[0])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_learns_in_every_dtype(method: Method) -> None:
    """The same few batches get easier: no dead start, nothing lost to a merge."""
    for dtype in method.dtypes:
        model, strategy, optimizer = built(method, dtype)
        losses = train(model, strategy, optimizer, range(1, 2 * method.steps))
        assert all(torch.isfinite(torch.tensor(losses)))
        assert sum(losses[-3:]) < sum(losses[:3]) - 0.1


@pytest.mark.parametrize("method", [m for m in METHODS if m.same_on_meta], ids=str)
def test_builds_on_meta_with_the_same_tensors(method: Method) -> None:
    """The planner counts on it: names, shapes, dtypes and the optimizer's state without a number in memory."""
    model, _, optimizer = built(method)
    with torch.device("meta"):
        counted = Toy()
    strategy = method.strategy()
    strategy.prepare(counted)
    on_meta = strategy.optimizer(counted, lr=0.02)
    on_meta.initialize()
    optimizer.initialize()
    described = [
        {name: (value.shape, value.dtype) for name, value in one.state_dict().items()} for one in (model, counted)
    ]
    assert described[0] == described[1]
    assert all(value.is_meta for value in counted.state_dict().values())
    assert on_meta.state_bytes() == optimizer.state_bytes()
