"""DLRT: orthonormal bases, the projected gradient flow, falling energy, a truncation that loses what it says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.dlrt import DLRT, DLRTLinear, rank_within
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.moments_of import moments_of
from tests.nn.methods import Method, Toy, train, weights

SHAPES = [(20, 12), (8, 20), (12, 12), (13, 9)]
NO_MOMENTS = moments_of(torch.optim.SGD([torch.zeros(1)], lr=0.1))
CHOICES = [{"rank": 3, "theta": None}, {"rank": 3, "theta": 0.05}]


def layer_of(shape: tuple[int, int], **options: object) -> DLRTLinear:
    torch.manual_seed(sum(shape))
    layer = DLRTLinear.from_linear(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64), **options)
    assert isinstance(layer, DLRTLinear)
    return layer


def integrate(
    layer: DLRTLinear, target: Tensor, lr: float, steps: int, after: Callable[[], None] | None = None
) -> None:
    """Steps of the integrator, three updates of SGD each, on |W - T|^2 / 2; `after` each update."""
    events = DLRT.events(layer.weights)
    for update in range(1, 3 * steps + 1):
        trained = [param for param in layer.parameters() if param.requires_grad]
        assert len(trained) == 1, "one factor at a time"
        (gradient,) = torch.autograd.grad(0.5 * (layer.dense_weight() - target).square().sum(), trained)
        trained[0].data -= lr * gradient
        for event in events:
            if event.due(update):
                event.run(event.number(update), {"x": layer}, NO_MOMENTS)
        if after is not None:
            after()


def target_of(layer: DLRTLinear) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(layer.out_features, layer.in_features, dtype=torch.float64)


def projected(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The part of a gradient in the tangent space of the matrices of rank r at left S right^T."""
    on_left, on_right = left @ left.T, right @ right.T
    return on_left @ gradient + gradient @ on_right - on_left @ gradient @ on_right


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bases_stay_orthonormal(shape: tuple[int, int], options: dict[str, object]) -> None:
    """1e-12: each is a Q of a QR in float64, or such a Q times another."""
    layer = layer_of(shape, **options)

    def check() -> None:
        for basis in (layer.U.detach(), layer.V.detach()):
            identity = torch.eye(basis.shape[1], dtype=torch.float64)
            torch.testing.assert_close(basis.T @ basis, identity, atol=1e-12, rtol=0)

    integrate(layer, target_of(layer), lr=0.3, steps=20, after=check)


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_steps_follow_the_projected_gradient_flow(shape: tuple[int, int], options: dict[str, object]) -> None:
    """(W+ - W) / lr = -P(gradient) + O(lr): at lr 1e-6 and 1e-5 the error is small, and ten times as large at 1e-5."""
    errors = []
    for lr in (1e-6, 1e-5):
        layer = layer_of(shape, **{**options, **({"theta": 1e-3} if options["theta"] else {})})
        target, start = target_of(layer), layer.dense_weight().detach().clone()
        flow = -projected(start - target, layer.U.detach(), layer.V.detach())
        integrate(layer, target, lr=lr, steps=1)
        assert layer.U.shape[1] == 3, "what has come in is below theta"
        errors.append(float(((layer.dense_weight() - start) / lr - flow).detach().norm() / flow.norm()))
    assert errors[1] < 0.02
    assert errors[0] == pytest.approx(errors[1] / 10, rel=0.1)


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_falls_to_that_of_the_best_approximation(shape: tuple[int, int], options: dict[str, object]) -> None:
    """In each step of the integrator, down to the truncated decomposition of the target, within 1 % of what that
    discards; with a small theta the rank rises to its limit of half the short side."""
    layer = layer_of(shape, **options)
    target = target_of(layer)
    energies = [0.5 * float((layer.dense_weight() - target).detach().square().sum())]
    for _ in range(150):
        integrate(layer, target, lr=0.2, steps=1)
        energies.append(0.5 * float((layer.dense_weight() - target).detach().square().sum()))
        assert energies[-1] <= energies[-2] + 1e-9
    values = torch.linalg.svdvals(target)
    rank = layer.U.shape[1]
    assert rank == (3 if options["theta"] is None else min(shape) // 2)
    assert energies[-1] <= 1.01 * 0.5 * float(values[rank:].square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_fixed_rank_is_the_integrator_written_out(shape: tuple[int, int]) -> None:
    """50 steps beside the equations with a decomposition by eigenvectors in place of QR; 1e-8 for what 50 of each
    differ by, in products that do not depend on the choice of the bases."""
    layer = layer_of(shape, rank=3, theta=None)
    target = target_of(layer)
    left, small, right = (tensor.detach().clone() for tensor in (layer.U, layer.S, layer.V))

    def orth(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        return matrix @ vectors / values.sqrt()

    for _ in range(50):
        gradient = left @ small @ right.T - target
        new_left = orth(left @ small - 0.1 * gradient @ right)
        new_right = orth(right @ small.T - 0.1 * gradient.T @ left)
        small = (new_left.T @ left) @ small @ (right.T @ new_right)
        small = small - 0.1 * new_left.T @ (new_left @ small @ new_right.T - target) @ new_right
        left, right = new_left, new_right
    integrate(layer, target, lr=0.1, steps=50)
    torch.testing.assert_close(layer.dense_weight().detach(), left @ small @ right.T, atol=1e-8, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_discards_the_least_singular_values(shape: tuple[int, int]) -> None:
    """Of an S that is far from symmetric, where rows of Q^T taken for columns of Q would show."""
    layer = layer_of(shape, rank=4, theta=0.3)
    layer.end_k_()
    layer.end_l_()
    assert layer.S.shape == (8, 8) and layer.U.shape == (shape[0], 8) and layer.V.shape == (shape[1], 8)
    with torch.no_grad():
        layer.S.normal_()
    values, before = torch.linalg.svdvals(layer.S.detach()), layer.dense_weight().detach()
    layer.end_s_()
    rank = layer.S.shape[0]
    lost = float((layer.dense_weight() - before).detach().norm())
    assert lost == pytest.approx(float(values[rank:].norm()), abs=1e-12)
    assert rank == min(min(shape) // 2, rank_within(values, 0.3, 8))


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gradient_nothing_changes(shape: tuple[int, int], options: dict[str, object]) -> None:
    """All three forms stand for one W, and its rank of 3 is found again; 1e-12: float64 products."""
    layer = layer_of(shape, **options)
    before = layer.dense_weight().detach().clone()
    for action in (layer.end_k_, layer.end_l_, layer.end_s_):
        action()
        torch.testing.assert_close(layer.dense_weight().detach(), before, atol=1e-12, rtol=0)
    assert layer.U.shape[1] == 3


@pytest.mark.parametrize("when", ["after_backward", "in_backward"])
def test_factors_that_are_gone_take_no_memory(when: str) -> None:
    """There is a new one after each update; an optimizer that held on to them would fill any memory."""
    model = Toy()
    strategy = Method("dlrt", weights("dlrt.DLRT", rank=3)).strategy(when=when)
    strategy.prepare(model)
    gone: list[weakref.ref[nn.Parameter]] = []

    def note(step: int) -> None:
        layer = layers_of(model)["square"]
        gone.extend(weakref.ref(param) for param in layer.parameters() if param.requires_grad and param.ndim == 2)

    train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, 10), note)
    gc.collect()
    assert [reference() is None for reference in gone] == [True] * 8 + [False]


def test_rank_is_the_least_whose_tail_is_below_theta() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1])
    for theta in (0.01, 0.05, 0.2, 0.3, 0.6, 0.99):
        expected = next(j for j in range(6) if float(values[j:].norm()) < theta * float(values.norm()))
        assert rank_within(values, theta, most=9) == max(2, expected)
    assert rank_within(values, 0.01, most=3) == 3
    assert rank_within(torch.zeros(4), 0.1, most=2) == 2


def test_ranks_that_do_not_fit_are_refused_with_a_way_out() -> None:
    fault = DLRT(rank=7, theta=0.1).misfit((12, 20))
    assert fault is not None and "strategy.weights.theta=null" in fault
    assert DLRT(rank=7, theta=None).misfit((12, 20)) is None
    assert DLRT(rank=13, theta=None).misfit((12, 20)) is not None
    for options, key in (({"rank": 0}, "rank"), ({"rank": 1}, "rank"), ({"theta": 1.0}, "theta")):
        with pytest.raises(ValueError, match=f"strategy.weights.{key}"):
            DLRT(**options)  # type: ignore[arg-type]
