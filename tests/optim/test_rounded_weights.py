"""bfloat16 weights whose updates are not lost: means, bounds, moments of stepping, resume, bytes, what is counted."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.groups import Group
from lowrank_train.optim.moments import Adam, Momentum
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.selection import slots_for
from lowrank_train.optim.transform import Transform
from lowrank_train.published.entry import optimizer as published
from lowrank_train.strategy import Strategy
from tests.optim.methods import METHODS, Method, toy_batch, toy_model, weights

KEPT: tuple[Rounding, ...] = ("stochastic", "compensated")
UPDATES = 6  # across a move of the basis, which comes every 4
BF16 = torch.bfloat16


def of_params(
    params: dict[str, Tensor], rule: Transform, lr: float, seed: int = 1, **arguments: Any
) -> TransformOptimizer:
    pairs = list(params.items())
    slots = slots_for(pairs, seed=seed, state_dtype=torch.float32)
    return TransformOptimizer([Group("rest", rule, pairs, slots)], lr=lr, **arguments)


def parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(BF16))


def step(optimizer: TransformOptimizer, param: Tensor, grad: Tensor) -> None:
    param.grad = grad.to(param.dtype)
    optimizer.step()


def strategy_of(method: Method, model: nn.Module, rounding: Rounding, when: Any = "after_backward") -> Strategy:
    config = method.config()
    config.when = when
    strategy = Strategy.from_config(config, seed=7, rounding=rounding)
    strategy.prepare(model)
    return strategy


def train(model: nn.Module, optimizer: TransformOptimizer, updates: range) -> Tensor:
    for update in updates:
        inputs, targets = toy_batch(update, dtype=BF16)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
    return weights(model)


def trained(method: Method, rounding: Rounding, when: str = "after_backward", **arguments: Any) -> Tensor:
    model = toy_model(BF16)
    optimizer = strategy_of(method, model, rounding, when).optimizer(model, lr=1e-2, weight_decay=0.1, **arguments)
    return train(model, optimizer, range(UPDATES))


def test_small_updates_move_weights_by_the_right_mean() -> None:
    """Weights in [1/2, 1) have neighbours s = 2^-8 apart, and 44 updates of 2^-12 = s/16 make 2.75 s.

    One update moves a weight by s with probability p = 1/16, else not, so that of the mean over n weights of the sum
    of T updates the variance is T s^2 p (1 - p) / n. Five standard deviations.
    """
    count, updates, size, spacing = 4096, 44, 2**-12, 2**-8
    share = size / spacing
    deviation = spacing * (updates * share * (1 - share) / count) ** 0.5
    moved = {}
    for rounding in ("nearest", *KEPT):
        param = parameter(torch.full((64, 64), 0.75))
        optimizer = of_params({"w": param}, Momentum(momentum=0.0), lr=size, rounding=rounding)
        for _ in range(updates):
            step(optimizer, param, -torch.ones_like(param))
        moved[rounding] = param.detach().float() - 0.75
    assert moved["nearest"].count_nonzero() == 0
    assert abs(moved["stochastic"].mean().item() - updates * size) < 5 * deviation
    assert moved["stochastic"].std() > 0
    assert torch.equal(moved["compensated"], torch.full((64, 64), 3 * spacing))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33), (57,)])
def test_compensated_weights_follow_float32(shape: tuple[int, ...]) -> None:
    """Each write keeps w + r to 2^-16 of w (2^-8 of 2^-8); Adam without weights in its gradient sees no difference.

    T writes are apart by at most T 2^-16 max |w|, and float32's own roundings, 2^-24 each, by less than 1 % of it.
    """
    generator = torch.Generator().manual_seed(2)
    start, updates = torch.randn(shape, generator=generator).to(BF16), 30
    narrow, exact = parameter(start), nn.Parameter(start.float())
    one = of_params({"w": narrow}, Adam(), lr=1e-4, rounding="compensated")
    other = of_params({"w": exact}, Adam(), lr=1e-4)
    plain = parameter(start)
    third = of_params({"w": plain}, Adam(), lr=1e-4)
    for _ in range(updates):
        grad = torch.randn(shape, generator=generator).to(BF16)
        for optimizer, param in ((one, narrow), (other, exact), (third, plain)):
            step(optimizer, param, grad)
    residue = one.state_of(narrow)["residue"]
    assert isinstance(residue, Tensor) and residue.dtype is BF16
    bound = 1.01 * updates * 2**-16 * exact.detach().abs().max()
    assert (narrow.float() + residue.float() - exact).abs().max() <= bound
    assert (plain.float() - exact).abs().max() > bound


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_steps_alike_after_and_inside_backward(method: Method) -> None:
    plain, inside = (trained(method, "stochastic", when) for when in ("after_backward", "in_backward"))
    assert plain.isfinite().all()
    assert torch.equal(plain, inside)
    assert not torch.equal(plain, trained(method, "nearest"))


@pytest.mark.parametrize("rounding", KEPT)
@pytest.mark.parametrize("name", ["galore", "galore-staggered", "q-galore"])
def test_project_in_backward_is_the_same(name: str, rounding: Rounding) -> None:
    method = next(method for method in METHODS if method.name == name)
    assert torch.equal(trained(method, rounding), trained(method, rounding, "project_in_backward"))


@pytest.mark.parametrize("rounding", KEPT)
@pytest.mark.parametrize("name", ["full", "galore-8bit", "badam", "galore-in-blocks", "library", "subtrack"])
def test_resume_is_exact(name: str, rounding: Rounding) -> None:
    """Also the drawn bits go on, and so do residues: what is kept is saved, and nothing else is needed."""
    method = next(method for method in METHODS if method.name == name)
    model, fresh = toy_model(BF16), toy_model(BF16)
    optimizer = strategy_of(method, model, rounding).optimizer(model, lr=1e-2)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = train(model, optimizer, range(3, UPDATES))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.load_state_dict(saved["model"])
    resumed = strategy_of(method, fresh, rounding).optimizer(fresh, lr=1e-2)
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(train(fresh, resumed, range(3, UPDATES)), whole)
    kept = {key for param in optimizer.slots for key in optimizer.state_of(param)}
    assert ("residue" in kept, "times_written" in kept) == (rounding == "compensated", rounding == "stochastic")


def test_another_rounding_can_go_on_from_a_checkpoint() -> None:
    """From compensated to stochastic and back: residues begin at zero, and what is of no use is dropped."""
    model = toy_model(BF16)
    optimizer = strategy_of(METHODS[0], model, "compensated").optimizer(model, lr=1e-2)
    train(model, optimizer, range(2))
    drawing = strategy_of(METHODS[0], model, "stochastic").optimizer(model, lr=1e-2)
    drawing.load_state_dict(optimizer.state_dict())
    assert "residue" not in drawing.state_bytes()
    train(model, drawing, range(2, 3))
    back = strategy_of(METHODS[0], model, "compensated").optimizer(model, lr=1e-2)
    back.load_state_dict(drawing.state_dict())
    train(model, back, range(3, 4))
    assert back.state_bytes()["residue"] == 2 * weights(model).numel()


def test_bits_follow_from_the_name_and_the_number_of_the_update() -> None:
    """Not from the order of the parameters, nor from what else is trained."""

    def run(names: list[str], updates: int = 3, seed: int = 1) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {name: parameter(torch.full((8, 8), 0.75)) for name in names}
        optimizer = of_params(params, Momentum(momentum=0.0), lr=2**-9, seed=seed, rounding="stochastic")
        for _ in range(updates):
            for param in params.values():
                param.grad = -torch.ones_like(param)
            optimizer.step()
        return params

    both, swapped, alone = run(["a", "b"]), run(["b", "a"]), run(["a"])
    assert torch.equal(both["a"], swapped["a"]) and torch.equal(both["b"], swapped["b"])
    assert torch.equal(both["a"], alone["a"])
    assert not torch.equal(both["a"], both["b"])
    assert not torch.equal(alone["a"], run(["a"], seed=2)["a"])
    first, second = run(["a"], 1)["a"] - 0.75, run(["a"], 2)["a"] - run(["a"], 1)["a"]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rounding", ["nearest", *KEPT])
def test_lost_updates_of_a_hand_example(rounding: Rounding) -> None:
    """Neighbours of 1 are 2^-8 below: 2^-3 arrives whole, 2^-40 is lost in any case, also in float32, and 0 is none.

    2^-11 is lost by rounding to the nearest, and kept as a residue. A weight of 2^-4 takes all that is above 2^-13.
    """
    param = parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 2**-4]))
    optimizer = of_params({"w": param}, Momentum(momentum=0.0), lr=1.0, rounding=rounding, count_lost_updates=True)
    assert optimizer.stats["lost_updates_pct"] is None
    step(optimizer, param, torch.tensor([2**-3, 2**-11, 2**-40, 0.0, 2**-11]))
    stayed = param.detach()[1].item() == 1.0
    assert optimizer.stats["lost_updates_pct"] == {"nearest": 20, "compensated": 0, "stochastic": 20 * stayed}[rounding]
    assert param.detach()[[0, 2, 3]].tolist() == [0.875, 1.0, 1.0]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["galore", "full-8bit", "subtrack", "trion", "library", "galore-plus", "adafactor"])
def test_counting_changes_nothing(name: str, rounding: Rounding) -> None:
    """The rule runs on copies beside, and some take the gradient for their workspace."""
    method = next(method for method in METHODS if method.name == name)
    assert torch.equal(trained(method, rounding), trained(method, rounding, count_lost_updates=True))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_residues_are_counted(method: Method) -> None:
    model = toy_model(BF16)
    strategy = strategy_of(method, model, "compensated")
    optimizer = strategy.optimizer(model, lr=1e-2)
    optimizer.initialize()
    bytes_of = optimizer.state_bytes()
    assert bytes_of["residue"] == 2 * sum(param.numel() for param in optimizer.slots)
    rows = strategy.assignment(model)
    assert sum(row.residue_bytes for row in rows) == bytes_of["residue"]
    assert sum(row.state_bytes for row in rows) == sum(bytes_of.values()) - bytes_of.get("shared", 0)


def test_residues_go_with_the_state_and_with_the_weights_they_belong_to() -> None:
    params = {name: parameter(torch.ones(4, 4)) for name in "abc"}
    optimizer = of_params(dict(params), Adam(), lr=1e-4, rounding="compensated")
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.forget(params["a"])
    assert optimizer.state_of(params["a"]) == {}
    with torch.no_grad(), optimizer.rounded_weights.changed_within():
        params["b"].mul_(2)
    assert {"residue", "exp_avg"} & optimizer.state_of(params["b"]).keys() == {"exp_avg"}
    assert "residue" in optimizer.state_of(params["c"])
    pairs: list[tuple[str, Tensor]] = [("b", params["b"])]
    optimizer.regroup([Group("rest", Adam(), pairs, slots_for(pairs, seed=1))])
    assert optimizer.state_of(params["c"]) == {}


def test_the_library_entry_takes_it_and_float32_weights_are_left_alone() -> None:
    layers = {dtype: toy_model(dtype) for dtype in (BF16, torch.float32)}
    for dtype, model in layers.items():
        optimizer = published("galore", model, lr=1e-2, rank=3, rounding="compensated", count_lost_updates=True)
        optimizer.initialize()
        assert ("residue" in optimizer.state_bytes()) == (dtype is BF16)
        assert optimizer.stats["lost_updates_pct"] is None
