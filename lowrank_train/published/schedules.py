"""The learning-rate schedules of the published training scripts, with everything in which they differ from ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

from lowrank_train.optim.schedule import cosine, multiplier

SchedulerType = Literal["linear", "cosine", "cosine_restarts"]
Repo = Literal["relora", "GaLore", "SLTrain"]

CYCLE_START_MULTIPLIER = 1e-7  # of the first two updates of a later cycle, in place of 0 and 1 / warmup_steps
CYCLE_START_STEPS = 2


def schedule(
    scheduler_type: SchedulerType,
    *,
    repo: Repo = "relora",
    num_training_steps: int,
    warmup_steps: int,
    min_lr_ratio: float = 0.1,
    cycle_length: int | None = None,
    restart_warmup_steps: int | None = None,
    adjust_step: int = 0,
) -> Callable[[int], float]:
    """The multiplier of the learning rate of the update after `step` updates, for torch's LambdaLR or by hand.

    Names of the options as in peft_pretraining/training_utils.py of relora (arXiv 2307.05695), GaLore (arXiv
    2403.03507) and SLTrain (arXiv 2406.02214). All start at multiplier 0 and warm up in a line over `warmup_steps`;
    M is the cosine from 1 at `warmup_steps` to `min_lr_ratio` at `num_training_steps`, and up again after that.

    linear: down to 0 at `num_training_steps`, whatever `min_lr_ratio` and `cycle_length` say, and 0 ever after.
    cosine: warm-up and cosine anew in every cycle of `cycle_length` updates (None: `num_training_steps`), the first two
        updates of a later cycle's warm-up at 1e-7. At `num_training_steps` a new cycle begins.
    cosine_restarts: M(v) with v = step + adjust_step, and a line up from 0 over the first `restart_warmup_steps` of
        every cycle: (q / restart_warmup_steps) * M(v - q + p), q = v mod cycle_length.
        relora: p = restart_warmup_steps, so that the line meets the cosine, and none as long as step < cycle_length:
        with an `adjust_step` the first restart, or the part of it that comes before, is left out.
        GaLore and SLTrain: p = warmup_steps, so that the rate jumps where the line ends, and a line in the first cycle
        too, where it outlasts the warm-up. All go on restarting past the end.

    ValueError for what those scripts refuse: a cycle that does not divide `num_training_steps`; a warm-up and
    `adjust_step` that together are longer than a cycle (GaLore: as long as one); `adjust_step` without restarts.
    """
    _refuse_unknown("scheduler_type", scheduler_type, get_args(SchedulerType))
    _refuse_unknown("repo", repo, get_args(Repo))
    if num_training_steps < 1 or warmup_steps < 0:
        raise ValueError(f"num_training_steps={num_training_steps}, warmup_steps={warmup_steps}: no such length")
    if adjust_step != 0 and scheduler_type != "cosine_restarts":
        raise ValueError(f"adjust_step={adjust_step}: only cosine_restarts has one")
    if scheduler_type == "linear":
        return functools.partial(_linear, warmup_steps=warmup_steps, steps=num_training_steps)
    if not 0 < min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio}: must lie in (0, 1]")
    if scheduler_type == "cosine" and cycle_length is None:
        cycle_length = num_training_steps
    if cycle_length is None or cycle_length < 1 or num_training_steps % cycle_length:
        raise ValueError(f"cycle_length={cycle_length}: must divide num_training_steps={num_training_steps}")
    if scheduler_type == "cosine":
        return functools.partial(
            _cycles, warmup_steps=warmup_steps, cycle_steps=cycle_length, min_lr_ratio=min_lr_ratio
        )
    if restart_warmup_steps is None or restart_warmup_steps < 0:
        raise ValueError(f"restart_warmup_steps={restart_warmup_steps}: cosine_restarts needs a number of updates")
    before_restart = warmup_steps + adjust_step
    if before_restart > cycle_length or (repo == "GaLore" and before_restart == cycle_length):
        raise ValueError(
            f"warmup_steps={warmup_steps} + adjust_step={adjust_step}: must be "
            f"{'below' if repo == 'GaLore' else 'at most'} cycle_length={cycle_length}"
        )
    return functools.partial(
        _restarts,
        continuous=repo == "relora",
        warmup_steps=warmup_steps,
        steps=num_training_steps,
        min_lr_ratio=min_lr_ratio,
        cycle_steps=cycle_length,
        restart_warmup_steps=restart_warmup_steps,
        adjust_step=adjust_step,
    )


def _refuse_unknown(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")


def _linear(step: int, *, warmup_steps: int, steps: int) -> float:
    return multiplier("linear", step, warmup_steps=warmup_steps, steps=steps, min_lr_ratio=0.0)


def _cycles(step: int, *, warmup_steps: int, cycle_steps: int, min_lr_ratio: float) -> float:
    phase = step % cycle_steps
    if step >= cycle_steps and phase < min(CYCLE_START_STEPS, warmup_steps):
        return CYCLE_START_MULTIPLIER
    return multiplier("cosine", phase, warmup_steps=warmup_steps, steps=cycle_steps, min_lr_ratio=min_lr_ratio)


def _restarts(
    step: int,
    *,
    continuous: bool,
    warmup_steps: int,
    steps: int,
    min_lr_ratio: float,
    cycle_steps: int,
    restart_warmup_steps: int,
    adjust_step: int,
) -> float:
    if step < warmup_steps:  # by the updates done, not by those adjusted
        return step / warmup_steps
    wave = functools.partial(cosine, warmup_steps=warmup_steps, steps=steps, min_lr_ratio=min_lr_ratio)
    shifted = step + adjust_step
    phase = shifted % cycle_steps
    if phase < restart_warmup_steps and (step >= cycle_steps or not continuous):
        heading_for = shifted - phase + (restart_warmup_steps if continuous else warmup_steps)
        return phase / restart_warmup_steps * wave(heading_for)
    return wave(shifted)
