"""SLoPe: both masks against direct loops, the biased backward pass, compressed AdamW, adapters that change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.reparam import layers_of
from lowrank_train.nn.slope import BLOCK_ROWS, SLoPe, SLoPeLinear, columns_of, expand
from tests.nn.methods import Method, Toy, train, weights

SHAPES = [(20, 12), (8, 20), (12, 12), (2 * BLOCK_ROWS + 4, 8)]  # the last in three blocks of rows


def layer_of(shape: tuple[int, int], **options: object) -> tuple[SLoPeLinear, Tensor]:
    """A layer and the matrix it was built from."""
    torch.manual_seed(sum(shape))
    linear = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    weight = linear.weight.detach().clone()
    layer = SLoPeLinear.from_linear(linear, name="x", **options)
    assert isinstance(layer, SLoPeLinear)
    return layer, weight


def two_of_four(weight: Tensor) -> Tensor:
    """The 2:4 mask along the rows, entry by entry."""
    mask = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 4):
            group = weight[row, first : first + 4].abs().tolist()
            for column in sorted(range(4), key=lambda place, group=group: -group[place])[:2]:  # type: ignore[misc]
                mask[row, first + column] = 1
    return mask


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_those_of_a_direct_loop(shape: tuple[int, int]) -> None:
    layer, weight = layer_of(shape)
    first = two_of_four(weight)
    assert torch.equal(layer.dense_weight(), weight * first)
    second = two_of_four((weight * first).T).T
    assert torch.equal(expand(layer.values * layer.backward_kept, layer.pattern), weight * first * second)
    assert layer.values.shape == (shape[0], shape[1] // 2)
    assert (layer.pattern.shape, layer.pattern.dtype) == ((shape[0], shape[1] // 4), torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_goes_through_the_double_pruned_matrix(shape: tuple[int, int]) -> None:
    """Exact up to the order of float64 sums of at most 516 terms."""
    layer, weight = layer_of(shape)
    first = two_of_four(weight)
    second = two_of_four((weight * first).T).T
    x = torch.randn(3, 5, shape[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, shape[0], dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, weight * first, layer.bias), atol=1e-12, rtol=0)
    y.backward(grad)
    assert x.grad is not None and layer.values.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ (weight * first * second), atol=1e-12, rtol=0)
    of_weight = torch.einsum("abm,abn->mn", grad, x.detach()) * first
    torch.testing.assert_close(expand(layer.values.grad, layer.pattern), of_weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), atol=1e-12, rtol=0)


def test_compressed_adamw_is_adamw_on_the_kept_entries() -> None:
    """Element-wise, so the same but for the order of the sums in the gradient; decay included."""
    layer, weight = layer_of((20, 12))
    mask = two_of_four(weight)
    dense = nn.Parameter(weight * mask)
    ours = torch.optim.AdamW([layer.values], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW([dense], lr=0.01, weight_decay=0.1)
    for step in range(10):
        x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for optimizer, y in ((ours, layer(x) - layer.bias), (theirs, x @ dense.T)):
            optimizer.zero_grad()
            (y - 1).square().sum().backward()
        assert dense.grad is not None
        dense.grad *= mask
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.dense_weight(), dense * mask, atol=1e-9, rtol=0)


def test_adapters_come_without_a_change_and_are_scaled_by_the_rank() -> None:
    layer, _ = layer_of((20, 12), rank=3, lazy_after_steps=5)
    x = torch.randn(4, 12, dtype=torch.float64)
    before = layer(x)
    layer.add_adapters_()
    assert torch.equal(layer(x), before)
    assert layer.L is not None and layer.R is not None
    assert (layer.L.shape, layer.R.shape) == ((12, 3), (3, 20))
    assert 0.6 < float(layer.L.detach().std()) < 1.4  # 36 draws from N(0, 1)
    with torch.no_grad():
        layer.R.normal_()
    torch.testing.assert_close(layer(x), before + x @ layer.L @ layer.R / 3, atol=1e-12, rtol=0)


def test_masks_and_adapters_change_when_they_are_due() -> None:
    method = Method("slope", weights("slope.SLoPe", rank=2, mask_change_every=3, lazy_after_steps=5))
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.05)
    layer = layers_of(model)["square"]
    assert isinstance(layer, SLoPeLinear)
    masks, patterns, adapted = [layer.backward_kept.clone()], [layer.pattern.clone()], []

    def note(step: int) -> None:
        masks.append(layer.backward_kept.clone())
        patterns.append(layer.pattern.clone())
        adapted.append(layer.L is not None)

    train(model, strategy, optimizer, range(1, 10), note)
    changed = [step for step in range(1, 10) if not torch.equal(masks[step], masks[step - 1])]
    assert changed == [3, 6, 9]
    assert all(torch.equal(pattern, patterns[0]) for pattern in patterns)
    assert adapted == [False] * 4 + [True] * 5
    assert layer.R is not None
    assert layer.R.abs().sum() > 0, "the adapters learn"


def test_what_double_pruning_leaves_of_a_gaussian_matrix() -> None:
    """The sheet's figures: 87 % of the energy after the first mask, density 0.41 after both, 27 % of the norm apart;
    0.01 is five standard deviations or more at 256 x 256."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    nn.init.normal_(linear.weight)
    energy = linear.weight.detach().square().sum()
    layer = SLoPeLinear.from_linear(linear)
    assert isinstance(layer, SLoPeLinear)
    forward = layer.dense_weight().detach()
    backward = expand(layer.values.detach() * layer.backward_kept, layer.pattern)
    assert float(forward.square().sum() / energy) == pytest.approx(0.87, abs=0.01)
    assert float((backward != 0).float().mean()) == pytest.approx(0.41, abs=0.01)
    assert float((forward - backward).norm() / forward.norm()) == pytest.approx(0.27, abs=0.01)


def test_columns_ascend_in_each_row() -> None:
    layer, _ = layer_of((20, 12))
    assert (columns_of(layer.pattern).diff(dim=1) > 0).all()


@pytest.mark.parametrize("shape", [(5461, 2048), (2048, 5461)])
def test_sides_that_are_no_multiple_of_four_are_refused_with_a_way_out(shape: tuple[int, int]) -> None:
    fault = SLoPe().misfit(shape)
    assert fault is not None and "multiples of 4" in fault and "strategy.weights.modules" in fault
    assert SLoPe().misfit((2048, 2048)) is None


@pytest.mark.parametrize(
    "option", [{"mask_change_every": 0}, {"rank": 0}, {"lazy_after_steps": 0}, {"lazy_share": 1.0}]
)
def test_options_out_of_range_are_refused_by_name(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"strategy.weights.{next(iter(option))}"):
        SLoPe(**option)
    assert SLoPe(rank=13, lazy_after_steps=5).misfit((20, 12)) is not None
    assert SLoPe(rank=13).misfit((20, 12)) is None, "no adapters, no rank"


def test_adapters_come_in_the_last_hundredth_of_the_run() -> None:
    """As in the paper; a number of updates of one's own goes before."""
    for options, first in (({}, 1188), ({"lazy_share": 0.25}, 900), ({"lazy_after_steps": 7}, 7)):
        choice = SLoPe(**options)  # type: ignore[arg-type]
        choice.set_length(1200)
        assert [event.first for event in choice.events() if event.name == "lazy adapters"] == [first]
    choice = SLoPe(lazy_share=0.0)
    choice.set_length(1200)
    assert [event.name for event in choice.events()] == ["backward mask"]
