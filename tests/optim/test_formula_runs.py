"""Eight updates of methods without runnable published code, beside an independent float64 implementation.

The recorded numbers are the norm, the sum, the first and the last entry of the weight. Gradients are a formula of the
position and the update, so that a rule can be followed on paper.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.groups import Group
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.orthogonalize import Orthogonalized
from lowrank_train.optim.subspace.coordinates import Coordinates
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.geodesic import Geodesic
from lowrank_train.optim.transform import Slot, Transform

Shape = tuple[int, int]
TALL, WIDE, SQUARE = (10, 6), (6, 10), (8, 8)


def grass(shape: Shape) -> Transform:
    """Lines of the largest norm, along the short side; moments reset, no weights."""
    of = "columns" if shape[0] >= shape[1] else "rows"
    subspace = Coordinates(rank=2, density=None, every=3, of=of, choose="top")  # type: ignore[arg-type]
    return InSubspace(subspace, Adam(eps=1e-8), Backproject(1.0), "reset")


def subtrack(shape: Shape) -> Transform:
    """The tracked basis and the rotated moments, without the residual."""
    adam = Adam(eps=1e-6, eps_inside=False, rotation="uncorrected", weight_decay_first=False)
    return InSubspace(Geodesic(rank=2, every=3, step_size=1.0), adam, Backproject(0.25), "rotate")


def trion(shape: Shape) -> Transform:
    """Columns of the cosine matrix on the right, its rows on the left, scored by the sum of sizes."""
    subspace = Dct(rank=2, every=1, basis="dct3" if shape[0] >= shape[1] else "dct2", norm=1)
    return InSubspace(
        subspace, Orthogonalized(precision="wide"), Backproject(1.0), "keep", ErrorFeedback(retained=0.95)
    )


RECORDED: list[tuple[Callable[[Shape], Transform], Shape, tuple[float, float, float, float]]] = [
    (grass, TALL, (5.405094221253866, -26.372635598668445, 0.8407211159583816, -0.4621696060331106)),
    (grass, WIDE, (5.109105110741884, -24.048394452424372, 0.8206561986959064, -0.7846620730761666)),
    (grass, SQUARE, (5.472431059443894, -27.92874755022588, 0.8407211159583816, -0.648432737359763)),
    (subtrack, TALL, (5.427573852453633, -26.311028294633047, 0.857405893938734, -0.48653816411557854)),
    (subtrack, WIDE, (5.14913316004134, -23.984887024176196, 0.8700681105806215, -0.7818786989134013)),
    (subtrack, SQUARE, (5.503174751375272, -27.92506256999753, 0.8609350088962661, -0.6523888179967477)),
    (trion, TALL, (5.415455084620381, -26.342177587059126, 0.845694545210224, -0.490315749362914)),
    (trion, WIDE, (5.15339284878858, -23.990535159384102, 0.8722433578565195, -0.781365334895635)),
    (trion, SQUARE, (5.494235935056177, -27.93978647630949, 0.8514690432341692, -0.6472861209112559)),
]


def run(rule: Transform, shape: Shape) -> Tensor:
    row = torch.arange(1, shape[0] + 1, dtype=torch.float64)[:, None]
    column = torch.arange(1, shape[1] + 1, dtype=torch.float64)
    weight = nn.Parameter(torch.cos(0.3 * row + 0.2 * column))
    group = Group("projected", rule, [("w", weight)], [Slot("w", 1, 0.0, torch.float64)])
    optimizer = TransformOptimizer([group], lr=0.01, weight_decay=0.1)
    for update in range(8):
        first = torch.sin(0.37 * row * (column + 1) + 0.11 * update * row)
        weight.grad = first + 0.5 * torch.cos(0.23 * (row + 1) * column - 0.07 * update * column)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("rule", "shape", "recorded"), RECORDED, ids=lambda value: getattr(value, "__name__", None) and value.__name__
)
def test_run_is_the_recorded_one(
    rule: Callable[[Shape], Transform], shape: Shape, recorded: tuple[float, float, float, float]
) -> None:
    weight = run(rule(shape), shape)
    found = torch.stack([weight.norm(), weight.sum(), weight[0, 0], weight[-1, -1]])
    torch.testing.assert_close(found, torch.tensor(recorded, dtype=torch.float64), atol=1e-12, rtol=0)
