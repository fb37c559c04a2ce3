"""The published schedules beyond the recorded settings: adjusted restarts, odd warm-ups, past the end, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lowrank_train
from lowrank_train.published import schedule

LENGTHS: dict[str, Any] = {"num_training_steps": 84, "warmup_steps": 4}
RESTARTS: dict[str, Any] = {"scheduler_type": "cosine_restarts", "cycle_length": 42, "restart_warmup_steps": 3}
REPOS: Any = ("relora", "GaLore", "SLTrain")
EXACT = 1e-15  # a rounding or two of numbers up to 1


def wave(step: int) -> float:
    """M of the lengths above: 1 at update 4, 0.1 at 84, 1 at 164."""
    return 0.55 + 0.45 * math.cos(math.pi * (step - 4) / 80)


def test_at_the_top_level() -> None:
    assert lowrank_train.schedule is schedule


@pytest.mark.parametrize("repo", REPOS)
def test_adjusted_restarts(repo: Any) -> None:
    """v = step + 10: the phase is 0 at updates 32 and 74, but relora leaves out what comes before update 42."""
    factor = schedule(repo=repo, adjust_step=10, **RESTARTS, **LENGTHS)
    top = {"relora": wave(84 + 3)}.get(repo, wave(84 + 4))  # GaLore and SLTrain: at progress 84 / (84 - 4)
    first = {"relora": [wave(42), wave(43), wave(44)]}.get(repo, [0, wave(42 + 4) / 3, wave(42 + 4) * 2 / 3])
    assert [factor(step) for step in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, wave(14)], abs=EXACT)
    assert [factor(step) for step in (31, 32, 33, 34, 35)] == pytest.approx([wave(41), *first, wave(45)], abs=EXACT)
    assert [factor(step) for step in (42, 73)] == pytest.approx([wave(52), wave(83)], abs=EXACT)
    assert [factor(step) for step in (74, 75, 76, 77)] == pytest.approx([0, top / 3, top * 2 / 3, wave(87)], abs=EXACT)


def test_relora_goes_on_in_a_dip_that_began_before_the_first_cycle_was_over() -> None:
    """The guard looks at the update, not at the phase: with v = step + 2 the line of updates 40 to 42 shows at 42."""
    factor = schedule(adjust_step=2, **RESTARTS, **LENGTHS)
    assert [factor(step) for step in (40, 41, 42, 43)] == pytest.approx(
        [wave(42), wave(43), wave(45) * 2 / 3, wave(45)], abs=EXACT
    )


@pytest.mark.parametrize("repo", REPOS)
def test_a_restart_warm_up_that_outlasts_the_first_one(repo: Any) -> None:
    """GaLore and SLTrain fall back onto the line of cycle 0, towards 1."""
    factor = schedule(repo=repo, **RESTARTS | {"restart_warmup_steps": 6}, **LENGTHS)
    expected = [wave(4), wave(5), wave(6)] if repo == "relora" else [4 / 6, 5 / 6, wave(6)]
    assert [factor(step) for step in (4, 5, 6)] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("repo", REPOS)
def test_without_a_warm_up_or_a_restart_warm_up(repo: Any) -> None:
    lengths = LENGTHS | {"warmup_steps": 0}
    assert schedule(repo=repo, **RESTARTS, **lengths)(0) == (1 if repo == "relora" else 0)
    factor = schedule(repo=repo, **RESTARTS | {"restart_warmup_steps": 0}, **LENGTHS)
    assert [factor(step) for step in (4, 42, 84)] == pytest.approx([1, wave(42), 0.1], abs=EXACT)


@pytest.mark.parametrize("repo", REPOS)
def test_past_the_end(repo: Any) -> None:
    linear = schedule("linear", repo=repo, **LENGTHS)
    assert [linear(step) for step in (83, 84, 90)] == pytest.approx([1 / 80, 0, 0], abs=EXACT)
    cosine = schedule("cosine", repo=repo, **LENGTHS)
    assert [cosine(step) for step in (84, 85, 86, 88, 128)] == pytest.approx([1e-7, 1e-7, 0.5, 1, 0.55], abs=EXACT)
    restarts = schedule(repo=repo, **RESTARTS, **LENGTHS)
    assert [restarts(step) for step in (84, 124)] == pytest.approx([0, 0.55], abs=EXACT)
    assert restarts(125) > restarts(124)


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0, [1, 0.775]), (1, [1e-7, 1]), (2, [1e-7, 1e-7])])
def test_1e_7_only_within_the_warm_up_of_a_later_cycle(warmup_steps: int, expected: list[float]) -> None:
    """A cycle of 3 updates without a warm-up: M(1 / 3) = 0.1 + 0.9 * 0.75."""
    factor = schedule("cosine", num_training_steps=12, warmup_steps=warmup_steps, cycle_length=3)
    assert [factor(step) for step in (6, 7)] == pytest.approx(expected, abs=EXACT)


def test_under_the_scheduler_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(**RESTARTS, **LENGTHS))
    rates = []
    for _ in range(44):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [0, 0.5, 1, 1.5, 2]
    assert rates[-2:] == pytest.approx([0, 2 * wave(45) / 3], abs=2 * EXACT)


@pytest.mark.parametrize("repo", REPOS)
def test_the_warm_up_ends_before_the_first_restart(repo: Any) -> None:
    schedule(repo=repo, adjust_step=37, **RESTARTS, **LENGTHS)
    with pytest.raises(ValueError, match=r"warmup_steps=4 \+ adjust_step=39: must be .* cycle_length=42"):
        schedule(repo=repo, adjust_step=39, **RESTARTS, **LENGTHS)
    if repo == "GaLore":
        with pytest.raises(ValueError, match="must be below cycle_length=42"):
            schedule(repo=repo, adjust_step=38, **RESTARTS, **LENGTHS)
    else:
        schedule(repo=repo, adjust_step=38, **RESTARTS, **LENGTHS)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"cycle_length": 40}, "cycle_length=40: must divide num_training_steps=84"),
        ({"cycle_length": 0}, "cycle_length=0: must divide"),
        ({"cycle_length": None}, "cycle_length=None: must divide"),
        ({"scheduler_type": "cosine", "cycle_length": 40}, "cycle_length=40: must divide"),
        ({"restart_warmup_steps": None}, "restart_warmup_steps=None"),
        ({"min_lr_ratio": 0.0}, r"min_lr_ratio=0.0: must lie in \(0, 1\]"),
        ({"scheduler_type": "cosine", "adjust_step": 1}, "only cosine_restarts has one"),
        ({"scheduler_type": "cosin"}, "scheduler_type='cosin': must be one of linear, cosine, cosine_restarts"),
        ({"repo": "galore"}, "repo='galore': must be one of relora, GaLore, SLTrain"),
        ({"num_training_steps": 0}, "num_training_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_what_is_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        schedule(**LENGTHS | RESTARTS | keys)
