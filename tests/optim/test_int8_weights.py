"""int8 weights under every rule: small updates arrive on average, moments of stepping agree, resume is exact."""

from __future__ import annotations

import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.int8 import Int8
from lowrank_train.nn.reparam import Origin, ReparamLinear, layers_of
from lowrank_train.optim.moments import Adam, Momentum
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.strategy import Strategy
from tests.optim.methods import METHODS, Method, toy_batch, toy_model
from tests.optim.test_rounded_weights import of_params, step

BF16 = torch.bfloat16
UPDATES = 6  # across a move of the basis, which comes every 4


def prepared(
    method: Method, rounding: Rounding = "stochastic", when: Any = "after_backward", **arguments: Any
) -> tuple[nn.Module, TransformOptimizer]:
    config = method.config()
    config.when = when
    strategy = Strategy.from_config(config, seed=7, rounding=rounding, int8_group=32)
    model = toy_model(BF16)
    strategy.prepare(model)
    return model, strategy.optimizer(model, lr=1e-2, weight_decay=0.1, **arguments)


def codes(model: nn.Module) -> Tensor:
    """All that is trained, as bytes."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in model.state_dict().values()])


def train(model: nn.Module, optimizer: TransformOptimizer, updates: range = range(UPDATES)) -> Tensor:
    for update in updates:
        inputs, targets = toy_batch(update, dtype=BF16)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
    return codes(model)


def method_called(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def test_small_updates_move_weights_by_the_right_mean() -> None:
    """Updates of a hundredth of a step, 400 of them: to the nearest nothing moves, at random 4 steps on average.

    Two numbers of each group stay at its ends, so that its scale stays; one update of the others is a step up with
    probability 0.01. Five standard deviations of the mean over all numbers.
    """
    values = torch.full((64, 64), 0.25)
    values[:, 0], values[:, 1] = -1.0, 0.9
    grad = torch.full((64, 64), -1.0)
    grad[:, :2] = 0.0
    moved = {}
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(Int8Weight.of(values, group=64))
        assert isinstance(param, Int8Weight)
        param.store_(values, seed=0)  # the scales that rounding at random has
        if rounding == "nearest":
            param.store_(values)
        scale, start = float(param.scale[0]), param.decoded().detach()
        optimizer = of_params({"w": param}, Momentum(momentum=0.0), lr=scale / 100, rounding=rounding)
        for _ in range(400):
            step(optimizer, param, grad)
        moved[rounding] = (param.decoded().detach() - start)[:, 2:] / scale
    assert moved["nearest"].abs().max() < 0.01  # a scale that is rounded anew each time
    deviation = (400 * 0.01 * 0.99 / moved["stochastic"].numel()) ** 0.5
    assert abs(moved["stochastic"].mean().item() - 4) < 5 * deviation
    assert moved["stochastic"].std() > 1


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_steps_alike_after_and_inside_backward(method: Method) -> None:
    plain, inside = (train(*prepared(method, when=when)) for when in ("after_backward", "in_backward"))
    assert torch.equal(plain, inside)
    assert not torch.equal(plain, codes(prepared(method)[0]))


@pytest.mark.parametrize("name", ["galore", "galore-staggered", "q-galore"])
def test_project_in_backward_is_the_same(name: str) -> None:
    method = method_called(name)
    assert torch.equal(train(*prepared(method)), train(*prepared(method, when="project_in_backward")))


@pytest.mark.parametrize("name", ["full", "galore-8bit", "q-galore", "badam", "library", "subtrack"])
def test_resume_is_exact(name: str) -> None:
    """Codes, scales, state and the bits that are drawn, from what loads without running code."""
    method = method_called(name)
    (model, optimizer), (fresh, resumed) = prepared(method), prepared(method)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = train(model, optimizer, range(3, UPDATES))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(train(fresh, resumed, range(3, UPDATES)), whole)


@pytest.mark.parametrize("name", ["galore", "full-8bit", "subtrack", "library"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_counting_lost_updates_changes_nothing(name: str, rounding: Rounding) -> None:
    method = method_called(name)
    model, optimizer = prepared(method, rounding, count_lost_updates=True)
    assert torch.equal(train(model, optimizer), train(*prepared(method, rounding)))
    lost = optimizer.stats["lost_updates_pct"]
    assert 0 < lost < 100


def test_lost_updates_of_a_hand_example() -> None:
    """Steps of 2/255: an update of 2 of them arrives, one of a tenth is lost, and 0 is none."""
    param = nn.Parameter(Int8Weight.of(torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), group=4))
    optimizer = of_params({"w": param}, Momentum(momentum=0.0), lr=1.0, count_lost_updates=True)
    step(optimizer, param, torch.tensor([[0.0, 0.0, 4 / 255, 0.2 / 255]]))
    assert optimizer.stats["lost_updates_pct"] == 25


def test_layers_move_and_cast_without_losing_a_bit_and_stay_the_same_parameters() -> None:
    model, _ = prepared(method_called("full"))
    before, params = codes(model), dict(model.named_parameters())
    model.to("cpu")
    assert all(model.get_parameter(name) is param for name, param in params.items())
    model.float()
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert [name for name, _ in model.named_parameters()] == list(params)
    wide = model(toy_batch(0)[0])
    model.bfloat16()
    assert torch.equal(codes(model), before)
    assert wide.dtype is torch.float32


def test_a_checkpoint_of_another_group_is_refused_by_name() -> None:
    model, _ = prepared(method_called("full"))
    other = toy_model(BF16)
    lowrank_train.reparametrise(other, "int8", group=64)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight\.scale"):
        other.load_state_dict(model.state_dict())


def test_library_entry_rounds_at_random_unless_told_otherwise() -> None:
    cases: list[tuple[Rounding | None, bool]] = [(None, True), ("nearest", False), ("stochastic", True)]
    for said, kept in cases:
        model = toy_model(BF16)
        lowrank_train.reparametrise(model, "int8", group=32)
        assert len(layers_of(model)) == 3
        optimizer = lowrank_train.optimizer("galore", model, lr=1e-2, rank=3, rounding=said)
        train(model, optimizer)
        param = model.get_parameter("0.weight")
        assert ("times_written" in optimizer.state_of(param)) == kept


def test_matrices_are_encoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is encoded, those before it are gone: a model that fits only in codes can be made on its card."""
    build = Int8.build
    before: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(self: Int8, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        alive.append(sum(weight() is not None for weight in before))
        before.append(weakref.ref(linear.weight))
        return build(self, linear, origin)

    monkeypatch.setattr(Int8, "build", watched)
    prepared(method_called("full"))
    assert alive == [0, 0, 0]


def test_residues_are_refused() -> None:
    param = nn.Parameter(Int8Weight.of(torch.ones(4, 4)))
    optimizer = of_params({"w": param}, Adam(), lr=1e-4, rounding="compensated")
    with pytest.raises(ValueError, match="stochastic"):
        optimizer.initialize()
