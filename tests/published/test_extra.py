"""The methods without code to replay under their papers' option names: what the names become, and that they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank_train
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject, ScaledResidual
from lowrank_train.optim.orthogonalize import Orthogonalized
from lowrank_train.optim.sparse_residual import SparseResidual
from lowrank_train.optim.subspace.coordinates import Coordinates, SampledLines
from lowrank_train.optim.subspace.cross_head import CrossHead
from lowrank_train.optim.subspace.geodesic import Geodesic
from lowrank_train.published.entry import recipe_of
from tests.optim.methods import run_update, toy_batch, toy_model

HEADS = {"head_dim": 4, "row_heads": ["0.*"], "column_heads": ["2.*"], "residual_share": 0.1, "residual_warmup": 3}
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("galore_plus", {"rank": 4, "update_proj_gap": 10, "scale": 1.0, **HEADS}, 1e-2),
    ("grass", {"rank": 5, "update_proj_gap": 10, "scale": 1.0}, 1e-2),
    ("grass", {"rank": 5, "update_proj_gap": 10, "scale": 1.0, "proj_type": "multinomial_norm"}, 1e-2),
    ("subtrack", {"rank": 4, "subspace_update_interval": 10, "st_init_step_size": 1.0, "scale": 1.0}, 1e-2),
    ("trion", {"rank": 4, "scaling_type": "kimi"}, 3e-2),
    ("golore", {"rank": 4, "update_proj_gap": 10, "rand_epoch": 20, "scale": 1.0}, 1e-2),
]


def loss(model: nn.Module) -> float:
    inputs, targets = toy_batch(0)
    return nn.functional.mse_loss(model(inputs), targets).item()


@pytest.mark.parametrize(("method", "options", "lr"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_trains(method: str, options: dict[str, Any], lr: float) -> None:
    torch.manual_seed(0)
    model = toy_model()
    before = loss(model)
    optimizer = lowrank_train.optimizer(method, model, lr=lr, project=["*.weight"], **options)
    for _ in range(60):
        run_update(model, optimizer, 0)
    assert loss(model) < 0.3 * before


def projected(method: str, **options: Any) -> InSubspace:
    rule = recipe_of(method, options, published=False).projected
    assert isinstance(rule, InSubspace)
    return rule


def test_galore_plus_switches() -> None:
    rule = projected("galore_plus", rank=8, head_dim=16, row_heads=["*.q.*"], residual_share=0.02)
    assert isinstance(rule.subspace, CrossHead) and isinstance(rule.lift, SparseResidual)
    assert (rule.subspace.head_dim, rule.subspace.row_heads) == (16, ["*.q.*"])
    assert rule.subspace.column_heads == CrossHead(rank=1).column_heads
    assert (rule.lift.share, rule.lift.eps, rule.lift.eps_inside) == (0.02, 1e-6, False)
    assert isinstance(projected("galore_plus", residual_share=0).lift, Backproject)


def test_grass_choices() -> None:
    chosen = {kind: projected("grass", proj_type=kind).subspace for kind in ("topr", "uniform", "multinomial_norm")}
    assert isinstance(chosen["multinomial_norm"], SampledLines)
    for kind, choose in (("topr", "top"), ("uniform", "random")):
        subspace = chosen[kind]
        assert isinstance(subspace, Coordinates) and subspace.choose == choose
    assert projected("grass").on_refresh == "reset"


def test_subtrack_switches() -> None:
    rule = projected("subtrack", st_init_step_size=1e4)
    assert isinstance(rule.subspace, Geodesic) and rule.subspace.step_size == 1e4
    assert isinstance(rule.lift, ScaledResidual) and rule.on_refresh == "rotate"
    plain = projected("subtrack", recovery_scaling=False, adaptive_optimizer=False)
    assert isinstance(plain.lift, Backproject) and plain.on_refresh == "keep"


@pytest.mark.parametrize(
    ("kind", "expected"), [("kj", 2**0.5), ("kimi", 0.2 * 128**0.5), ("dion", 2**0.5), ("none", 1.0)]
)
def test_trion_scales_by_the_shape_of_the_whole_matrix(kind: str, expected: float) -> None:
    rule = projected("trion", scaling_type=kind)
    assert isinstance(rule.inner, Orthogonalized)
    assert rule.inner.adjustment((128, 64)) == pytest.approx(expected)
    assert rule.inner.adjustment((64, 128)) == pytest.approx({"dion": 0.5**0.5, "kj": 1.0}.get(kind, expected))


@pytest.mark.parametrize("method", ["galore_plus", "grass", "subtrack", "trion", "golore"])
def test_there_is_no_published_run_to_replay(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} cannot be run as published"):
        recipe_of(method, {}, published=True)
    with pytest.raises(ValueError, match=f"{method} has no option 'rnak'; did you mean rank"):
        recipe_of(method, {"rnak": 3}, published=False)
