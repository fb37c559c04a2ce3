"""Updates of 8-bit weights: the formula, and what rounding makes of updates smaller than a code's step."""

from __future__ import annotations

import pytest
import torch

from lowrank_train.kernels.affine import Affine, dequantize_affine, quantize_affine
from lowrank_train.kernels.int8_update import int8_update_


def decoded(weight: Affine, shape: tuple[int, ...]) -> torch.Tensor:
    return dequantize_affine(weight, shape, bits=8, group=64)


@pytest.mark.parametrize("shape", [(8, 64), (3, 50), (7,)], ids=str)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("decay", "decay_first"), [(0.0, True), (0.2, True), (0.2, False)])
def test_formula(shape: tuple[int, ...], seed: int | None, decay: float, decay_first: bool) -> None:
    """Within half a step of the group to the nearest, within a whole one at random."""
    generator = torch.Generator().manual_seed(1)
    values, update = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    weight = quantize_affine(values, bits=8, group=64)
    before = decoded(weight, shape)
    int8_update_(weight, update, factor=-0.5, decay=decay, decay_first=decay_first, group=64, seed=seed)
    exact = (1 - decay) * before - 0.5 * update if decay_first else (1 - decay) * (before - 0.5 * update)
    step = weight.scale.repeat_interleave(64)[: values.numel()].view(shape)
    edge = 1.0  # the zero is rounded too, so that the ends of a group are up to half a step further off
    assert ((decoded(weight, shape) - exact).abs() <= step * (edge if seed is None else 1.5)).all()


def test_updates_below_half_a_step_are_kept_on_average() -> None:
    """500 updates of a hundredth of a step move the mean by five steps at random, and nothing to the nearest."""
    shape, number = (200, 64), 500
    values = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    values[:, 0], values[:, 1] = -1.5, 1.5  # they hold the scales of the groups as they are
    start = quantize_affine(values, bits=8, group=64)
    step = float(start.scale[0])
    update = torch.full(shape, step / 100)
    update[:, :2] = 0
    nearest, random = (Affine(*(part.clone() for part in vars(start).values())) for _ in range(2))
    for count in range(number):
        int8_update_(nearest, update, group=64)
        int8_update_(random, update, group=64, seed=count)
    assert torch.equal(nearest.codes, start.codes)
    moved = (decoded(random, shape) - decoded(start, shape))[:, 2:].double().mean() / step
    deviation = (number * 0.01 * 0.99 / (200 * 62)) ** 0.5  # each update is a step up with probability 0.01
    assert abs(moved - number / 100) < 5 * deviation + 0.02  # and groups whose scale wavered
