"""The strategy: which parameter goes where, what is printed about it, and what is refused before a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import ModelConfig
from lowrank_train.models import meta_model
from lowrank_train.strategy import Strategy
from tests.optim.methods import in_subspace, optimizer_of, subspace, toy_model

LLAMA = ["*.self_attn.*.weight", "*.mlp.*.weight"]


def refused(match: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=match):
        optimizer_of(in_subspace(**changes)(), toy_model())


def test_every_parameter_is_in_exactly_one_group() -> None:
    config = in_subspace(subspace=subspace("svd", rank=8))()
    config.select = LLAMA
    model = meta_model(ModelConfig(), vocab_size=100)
    optimizer = Strategy.from_config(config).optimizer(model, lr=1e-3)
    by_group = {group["name"]: set(group["param_names"]) for group in optimizer.param_groups}
    names = {name for name, _ in model.named_parameters()}
    assert by_group["projected"] | by_group["rest"] == names
    assert not by_group["projected"] & by_group["rest"]
    assert by_group["projected"] == {name for name in names if "_proj" in name}


def test_assignment_counts_what_the_optimizer_allocates() -> None:
    config = in_subspace(subspace=subspace("svd", rank=8))()
    config.select = LLAMA
    strategy = Strategy.from_config(config, state_dtype=torch.bfloat16)
    model = meta_model(ModelConfig(), vocab_size=100)
    rows = {row.name: row for row in strategy.assignment(model)}
    optimizer = strategy.optimizer(model, lr=1e-3)
    optimizer.initialize()
    assert sum(row.state_bytes for row in rows.values()) == sum(optimizer.state_bytes().values())
    down, gate = (rows[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("down", "gate"))
    assert (down.role, down.side, down.rank) == ("projected", "left", 8)
    assert down.state_bytes == 2 * (128 * 8 + 2 * 352 * 8)  # B on the short side, two moments on the long one
    assert (gate.side, gate.state_bytes) == ("right", down.state_bytes)
    assert (rows["lm_head.weight"].role, rows["lm_head.weight"].state_bytes) == ("rest", 2 * 2 * 100 * 128)


def test_frozen_parameters_are_left_out() -> None:
    model = toy_model()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    optimizer = optimizer_of(in_subspace()(), model)
    assert "0.weight" not in [name for group in optimizer.param_groups for name in group["param_names"]]


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    config = in_subspace()()
    config.select = ["*.weight", "4.wieght"]
    with pytest.raises(UserError, match=r"'4\.wieght' matched no parameter; nearest: 4\.weight"):
        optimizer_of(config, toy_model())


def test_vectors_cannot_be_projected() -> None:
    config = in_subspace()()
    config.select = ["*"]
    with pytest.raises(UserError, match="only matrices can be projected") as caught:
        optimizer_of(config, toy_model())
    assert len(caught.value.faults) == 3  # every bias, at once


def test_rank_above_a_matrix_is_refused() -> None:
    refused(
        r"4\.weight of shape \(7, 20\): strategy.subspace.rank is 9, but must be at most 7",
        subspace=subspace("svd", rank=9),
    )


@pytest.mark.parametrize("key", ["rank", "every"])
def test_values_below_one_are_refused(key: str) -> None:
    refused(f"{key} is 0; it must be at least 1", subspace=subspace("svd", **{key: 0}))


@pytest.mark.parametrize(
    ("when", "arguments", "match"),
    [
        ("in_backward", {"micro_batches": 2}, "cannot accumulate 2"),
        ("in_backward", {"grad_clip": 1.0}, "cannot clip"),
        ("project_in_backward", {"micro_batches": 2, "grad_clip": 1.0}, "cannot be known"),
    ],
)
def test_impossible_combinations_are_refused_with_a_way_out(when: str, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        optimizer_of(in_subspace()(), toy_model(), when=when, **arguments)
    assert "project" in str(caught.value) or "after_backward" in str(caught.value)
