"""Maestro: penalty and importance against direct loops, the walk over all pairs, the order that training finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.maestro import Maestro, MaestroLinear
from lowrank_train.nn.reparam import layers_of
from tests.nn.methods import Method, Toy, train, weights

SHAPES = [(20, 12), (8, 20), (12, 12), (7, 5)]


def layer_of(shape: tuple[int, int]) -> MaestroLinear:
    torch.manual_seed(sum(shape))
    layer = MaestroLinear.from_linear(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64))
    assert isinstance(layer, MaestroLinear)
    return layer


def penalty(second: Tensor, first: Tensor) -> Tensor:
    """sum_i (|V[i:]|_F + |U[:, i:]|_F), term by term."""
    terms = [first[i:].norm() + second[:, i:].norm() for i in range(len(first))]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_is_a_step_down_its_gradient(shape: tuple[int, int]) -> None:
    """1e-12: sums of at most 12 terms in float64. The share is small enough for no component to reach zero."""
    layer = layer_of(shape)
    penalty(layer.U, layer.V).backward()
    assert layer.U.grad is not None and layer.V.grad is not None
    expected = layer.U.detach() - 2e-3 * layer.U.grad, layer.V.detach() - 1e-3 * layer.V.grad
    layer.shrink_groups_(2e-3, 1e-3)
    for found, value in zip((layer.U, layer.V), expected, strict=True):
        torch.testing.assert_close(found.detach(), value, atol=1e-12, rtol=0)


def test_penalty_goes_on_at_zeros_and_stops_there() -> None:
    layer = layer_of((8, 20))
    with torch.no_grad():
        layer.V[5:] = 0
        layer.U[:, 3:] = 0
    before = layer.V.detach().clone()
    layer.shrink_groups_(0.01, 0.01)
    assert layer.V.isfinite().all() and layer.U.isfinite().all()
    assert not layer.V[5:].any() and not layer.U[:, 3:].any()
    assert (layer.V[:5].norm(dim=1) < before[:5].norm(dim=1)).all()
    layer.shrink_groups_(1e3, 1e3)
    assert not layer.V.any() and not layer.U.any(), "zero, and not beyond"


@pytest.mark.parametrize("shape", SHAPES)
def test_importance_is_that_of_a_direct_loop(shape: tuple[int, int]) -> None:
    layer = layer_of(shape)
    expected = [float(layer.V[i:].detach().norm() * layer.U[:, i:].detach().norm()) for i in range(min(shape))]
    assert layer.importance().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_uses_the_first_components_and_evaluation_all(shape: tuple[int, int]) -> None:
    layer = layer_of(shape)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    layer.set_width_(3)
    y = layer(x)
    torch.testing.assert_close(y, x @ (layer.U[:, :3] @ layer.V[:3]).T, atol=1e-12, rtol=0)
    y.sum().backward()
    assert layer.V.grad is not None
    assert layer.V.grad[:3].any() and not layer.V.grad[3:].any()
    torch.testing.assert_close(layer.eval()(x), x @ layer.dense_weight().T, atol=1e-12, rtol=0)


def test_walk_meets_every_pair_once_in_each_lap_and_begins_anew_with_a_thinning() -> None:
    choice = Maestro(shrink_every=20)
    walk = [choice.pair_of(number, [4, 1, 3], seed=7) for number in range(1, 60)]
    every_pair = {(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (2, 1), (2, 2), (2, 3)}
    for began in (20, 40):  # two laps of 8 pairs, and the 4 left before the next thinning
        for lap in (walk[began - 1 : began + 7], walk[began + 7 : began + 15]):
            assert set(lap) == every_pair
        assert walk[began - 1 : began + 7] != walk[began + 7 : began + 15]
    assert walk[19:27] != walk[39:47]
    assert [choice.pair_of(number, [4, 1, 3], seed=8) for number in range(1, 60)] != walk


def test_one_layer_at_a_time_is_cut() -> None:
    method = Method("maestro", weights("maestro.Maestro", shrink_every=100))
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    layers = {name: layer for name, layer in layers_of(model).items() if isinstance(layer, MaestroLinear)}
    seen = []

    def note(step: int) -> None:
        short = {name: int(layer.width) for name, layer in layers.items() if int(layer.width) < layer.components}
        assert len(short) <= 1
        seen.extend(short.items())

    train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, 40), note)
    components = {name: layer.components for name, layer in layers.items()}
    assert components == {"tall": 12, "square": 20, "wide": 8}
    assert len(seen) == len(set(seen)) >= 39 - 3, "39 of the first 40 pairs, of which 3 leave every layer whole"


def test_thinning_removes_what_has_faded_and_only_its_moments() -> None:
    method = Method("maestro", weights("maestro.Maestro", shrink_every=3, eps=1e-3))
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=1e-6)
    layers = {name: layer for name, layer in layers_of(model).items() if isinstance(layer, MaestroLinear)}
    with torch.no_grad():
        layers["tall"].V[5:] = 0
        layers["wide"].U[:, 1:] *= 1e-9
        layers["wide"].V[:] = 0
    train(model, strategy, optimizer, range(1, 4))
    assert {name: layer.components for name, layer in layers.items()} == {"tall": 5, "square": 20, "wide": 1}
    assert layers["tall"].U.shape == (20, 5) and layers["tall"].V.shape == (5, 12)
    assert optimizer.state.get(layers["tall"].U, {}) == {}
    assert optimizer.state[layers["square"].U]["step"] == 3
    assert all(int(layer.width) <= layer.components for layer in layers.values())


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_linear_regression_on_isotropic_data_finds_the_ordered_decomposition(shape: tuple[int, int]) -> None:
    """The first b components are the truncation of the target at b, for every b: the paper's check and its 1e-2."""
    layer, choice = layer_of(shape), Maestro(shrink_every=10**6)
    torch.manual_seed(3)
    left = torch.linalg.qr(torch.randn(shape[0], 4, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 4, dtype=torch.float64)).Q
    values = torch.tensor([3.0, 2.0, 1.2, 0.6], dtype=torch.float64)
    target, whole = left * values @ right.T, torch.eye(shape[1], dtype=torch.float64)
    for update in range(1, 4001):
        layer.set_width_(choice.pair_of(update, [layer.components], seed=1)[1])
        loss = 0.5 * (layer(whole) - target.T).square().sum()  # of isotropic x, in the mean
        gradients = torch.autograd.grad(loss, (layer.U, layer.V))
        for factor, gradient in zip((layer.U, layer.V), gradients, strict=True):
            factor.data -= 0.1 * gradient
    found = torch.linalg.svdvals(layer.dense_weight().detach())
    torch.testing.assert_close(found[:4], values, atol=1e-2, rtol=0)
    for width in range(1, 5):
        first = (layer.U[:, :width] @ layer.V[:width]).detach()
        best = left[:, :width] * values[:width] @ right[:, :width].T
        torch.testing.assert_close(first, best, atol=1e-2, rtol=0)


@pytest.mark.parametrize("option", [{"penalty": -1.0}, {"eps": -1.0}, {"shrink_every": 0}])
def test_options_out_of_range_are_refused_by_name(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"strategy.weights.{next(iter(option))}"):
        Maestro(**option)  # type: ignore[arg-type]
