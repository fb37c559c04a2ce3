"""Cuttlefish: stable ranks against the decomposition, the switch from a recorded history, the spectral factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_train.nn.cuttlefish import Cuttlefish, CuttlefishLinear, stable_rank
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.moments_of import moments_of
from tests.nn.methods import Method, Toy, train, weights

SHAPES = [(20, 12), (8, 20), (12, 12), (7, 5), (300, 200)]


def layer_of(shape: tuple[int, int], **options: object) -> CuttlefishLinear:
    torch.manual_seed(sum(shape))
    layer = CuttlefishLinear.from_linear(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64), **options)
    assert isinstance(layer, CuttlefishLinear)
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    """A relative 1e-4 where the Krylov space is smaller than the short side, rounding of float64 elsewhere."""
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    expected = float(values.square().sum() / values[0] ** 2)
    found = stable_rank(weight, torch.Generator().manual_seed(1))
    assert found == pytest.approx(expected, rel=1e-4 if min(shape) > 84 else 1e-9)


def test_stable_rank_at_its_ends() -> None:
    assert stable_rank(torch.zeros(6, 4), torch.Generator()) == 1
    assert stable_rank(torch.ones(6, 4), torch.Generator()) == pytest.approx(1, abs=1e-6)
    assert stable_rank(torch.eye(6), torch.Generator()) == pytest.approx(6, rel=1e-6)


RECORDED = [100, 90, 82, 75, 70, 66, 63, 61, 60, 59, 59, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58, 58]


def first_settled(stable_ranks: list[int], earliest: int, window: int, threshold: float) -> int | None:
    """The number of the evaluation, with each moving average as the weighted sum over the whole history."""
    averages = []
    for end in range(len(stable_ranks)):
        weighted = (7 / 8) ** end * stable_ranks[0]
        for index in range(1, end + 1):
            weighted += 1 / 8 * (7 / 8) ** (end - index) * stable_ranks[index]
        averages.append(weighted)
    for number in range(max(earliest, window + 1), len(stable_ranks) + 1):
        changes = [abs(averages[i] - averages[i - 1]) for i in range(number - window, number)]
        if sum(changes) / window <= threshold:
            return number
    return None


@pytest.mark.parametrize("threshold, window", [(0.1, 11), (1.0, 11), (1.5, 4), (0.5, 3)])
def test_a_recorded_history_settles_at_one_evaluation(threshold: float, window: int) -> None:
    choice = Cuttlefish(threshold=threshold, window=window)
    settled = [n for n in range(1, len(RECORDED) + 1) if choice.has_settled(RECORDED[:n])]
    expected = first_settled(RECORDED, 15, window, threshold)
    assert (settled[0] if settled else None) == expected
    assert expected is None or expected >= 15
    constant = [n for n in range(1, 21) if Cuttlefish().has_settled([40.0] * n)]
    assert constant[0] == 15, "not before the earliest evaluation"


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_lose_the_energy_that_is_discarded(shape: tuple[int, int]) -> None:
    """And are balanced: A A^T = B^T B = S_r. 1e-9: float64 decompositions of matrices of norm about 4."""
    layer = layer_of(shape, scaled=False)
    weight = layer.dense_weight().detach().clone()
    values = torch.linalg.svdvals(weight)
    layer.evaluate_(1)
    rank = layer.rank()
    assert rank == -(-float(layer.stable_ranks[0]) // 1), "rounded up"
    layer.switch_()
    if rank * sum(shape) >= shape[0] * shape[1]:
        assert layer.A is None and torch.equal(layer.dense_weight(), weight)
        return
    assert layer.A is not None and layer.B is not None and layer.weight is None
    assert (layer.A.shape, layer.B.shape) == ((rank, shape[1]), (shape[0], rank))
    lost = float((layer.dense_weight() - weight).detach().square().sum())
    assert lost == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)
    for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
        torch.testing.assert_close(gram.detach(), torch.diag(values[:rank]), atol=1e-9, rtol=0)


def test_rank_is_scaled_by_what_the_stable_rank_was_before_training() -> None:
    layer = layer_of((12, 8))
    layer.initial_stable_rank.fill_(2.0)
    layer.stable_ranks[:2] = torch.tensor([1.9, 1.1])
    assert layer.rank() == 5  # ceil(1.1 * 8 / 2)
    layer.stable_ranks[2] = 3.0
    assert layer.rank() == 8, "at most the short side"


def test_a_hundred_updates_of_the_factors() -> None:
    """SGD on |B A - T|^2 / 2 beside the same written out; 1e-9 for 100 updates in float64."""
    layer = layer_of((12, 20), scaled=False)
    layer.evaluate_(1)
    layer.switch_()
    assert layer.A is not None and layer.B is not None
    first, second = layer.A.detach().clone(), layer.B.detach().clone()
    torch.manual_seed(2)
    target = torch.randn(12, 20, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        y = layer(torch.eye(20, dtype=torch.float64))
        (0.5 * (y - target.T).square().sum()).backward()
        optimizer.step()
        residual = second @ first - target
        first, second = first - 0.01 * second.T @ residual, second - 0.01 * residual @ first.T
    torch.testing.assert_close(layer.dense_weight().detach(), second @ first, atol=1e-9, rtol=0)


def test_decay_is_the_gradient_of_the_product() -> None:
    layer = layer_of((12, 20), scaled=False)
    layer.evaluate_(1)
    layer.switch_()
    assert layer.A is not None and layer.B is not None
    (0.5 * (layer.B @ layer.A).square().sum()).backward()
    assert layer.A.grad is not None and layer.B.grad is not None
    expected = [factor.detach() - 0.3 * factor.grad for factor in (layer.A, layer.B)]  # type: ignore[operator]
    layer.decay_(0.3)
    for factor, value in zip((layer.A, layer.B), expected, strict=True):
        torch.testing.assert_close(factor.detach(), value, atol=1e-12, rtol=0)


def switched_after(**options: object) -> list[tuple[int, dict[str, bool]]]:
    """(update, which layers have been decided) over ten updates."""
    method = Method("cuttlefish", weights("cuttlefish.Cuttlefish", scaled=False, earliest_evaluation=1, **options))
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    seen = []

    def note(step: int) -> None:
        layers = layers_of(model)
        seen.append((step, {name: bool(layer.switched) for name, layer in layers.items()}))

    train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, 11), note)
    return seen


@pytest.mark.parametrize("threshold, update", [(1e9, 4), (0.0, 9)])
def test_all_layers_switch_together_when_settled_or_at_the_latest(threshold: float, update: int) -> None:
    """window=3 needs four evaluations, one an update; latest_steps=9."""
    for step, switched in switched_after(evaluate_every=1, window=3, threshold=threshold, latest_steps=9):
        assert set(switched.values()) == {step >= update}


def test_one_layer_that_moves_holds_back_the_others() -> None:
    choice = Cuttlefish(evaluate_every=1, earliest_evaluation=1, window=2, latest_steps=99, scaled=False)
    layers = {name: layer_of((12, 20), scaled=False, latest_steps=99, evaluate_every=1) for name in ("still", "moving")}
    moments = moments_of(torch.optim.SGD([p for layer in layers.values() for p in layer.parameters()], lr=0.1))
    (event, _) = choice.events()
    for number in range(1, 5):
        with torch.no_grad():
            assert layers["moving"].weight is not None
            layers["moving"].weight.copy_(torch.eye(12, 20) * (torch.arange(20) < 3 * number))  # stable rank 3 number
        event.run(number, layers, moments)
        assert not any(bool(layer.switched) for layer in layers.values())
    for number in range(5, 60):
        event.run(number, layers, moments)
    assert all(bool(layer.switched) for layer in layers.values())


@pytest.mark.parametrize(
    "option",
    [{"evaluate_every": 0}, {"window": 0}, {"earliest_evaluation": 0}, {"threshold": -1.0}, {"latest_steps": 99}],
)
def test_options_out_of_range_are_refused_by_name(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"strategy.weights.{next(iter(option))}"):
        Cuttlefish(**option)  # type: ignore[arg-type]
