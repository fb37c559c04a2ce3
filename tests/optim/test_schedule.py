"""The jagged cosine of ReLoRA: where it is the cosine, where it dips, and that it meets the cosine again."""

from __future__ import annotations

import pytest

from lowrank_train.optim.schedule import multiplier


def jagged(step: int, cycle: int, rewarm: int, warmup: int = 5, steps: int = 80) -> float:
    return multiplier(
        "cosine_restarts",
        step,
        warmup_steps=warmup,
        steps=steps,
        min_lr_ratio=0.1,
        cycle_steps=cycle,
        restart_warmup_steps=rewarm,
    )


def plain(step: int, warmup: int = 5, steps: int = 80) -> float:
    return multiplier("cosine", step, warmup_steps=warmup, steps=steps, min_lr_ratio=0.1)


@pytest.mark.parametrize(("cycle", "rewarm"), [(20, 5), (16, 16), (80, 5), (20, 0), (10, 1)])
def test_a_line_from_zero_to_the_cosine_after_every_multiple_of_the_cycle(cycle: int, rewarm: int) -> None:
    for step in range(80):
        start = step - step % cycle
        if step < cycle or step % cycle >= rewarm:
            assert jagged(step, cycle, rewarm) == plain(step)
        else:  # 1e-15: the order of one product
            expected = (step - start) * plain(start + rewarm) / rewarm
            assert jagged(step, cycle, rewarm) == pytest.approx(expected, abs=1e-15)


def test_values_by_hand() -> None:
    """T = 84, F = 4, so that M has its mean at update 44 and its end at 84."""
    assert [jagged(step, 42, 2, warmup=4, steps=84) for step in (0, 1, 4, 42)] == [0.0, 0.25, 1.0, 0.0]
    assert jagged(43, 42, 2, warmup=4, steps=84) == pytest.approx(0.55 / 2, abs=1e-15)
    assert jagged(44, 42, 2, warmup=4, steps=84) == pytest.approx(0.55, abs=1e-15)
    assert jagged(100, 42, 2, warmup=4, steps=84) == 0.1


def test_a_warm_up_of_the_whole_run_still_ends_at_the_least_rate() -> None:
    for schedule in ("cosine", "linear"):
        values = [multiplier(schedule, step, warmup_steps=4, steps=4, min_lr_ratio=0.1) for step in range(6)]
        assert values == [0.0, 0.25, 0.5, 0.75, 0.1, 0.1]
