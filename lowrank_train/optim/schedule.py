"""Learning-rate schedules as a multiplier of the base rate, in closed form from the number of updates done."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["cosine", "cosine_restarts", "linear", "constant"]


def multiplier(
    schedule: ScheduleName,
    step: int,
    *,
    warmup_steps: int,
    steps: int,
    min_lr_ratio: float = 0.0,
    cycle_steps: int | None = None,
    restart_warmup_steps: int = 0,
) -> float:
    """The factor on the learning rate of update number `step` (0-based: updates already done).

    Linear warm-up from 0 (the first update of a warm-up has rate 0, as in transformers and in GaLore's
    training_utils.py), then a cosine or a line down to `min_lr_ratio` at `steps`, and that value ever after.

    `cosine_restarts` is the jagged cosine of ReLoRA (arXiv 2307.05695): the same cosine M, but from every multiple of
    `cycle_steps` on the rate rises in a line from 0 and meets the cosine again after `restart_warmup_steps` updates:
    (q / restart_warmup_steps) * M(step - q + restart_warmup_steps) for q = step mod cycle_steps below
    restart_warmup_steps and step >= cycle_steps.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine_restarts":
        assert cycle_steps is not None, "cosine_restarts needs cycle_steps"
        phase = step % cycle_steps
        if phase < restart_warmup_steps and step >= cycle_steps:
            meets = step - phase + restart_warmup_steps
            rate = multiplier("cosine", meets, warmup_steps=warmup_steps, steps=steps, min_lr_ratio=min_lr_ratio)
            return phase / restart_warmup_steps * rate
    if step >= steps:
        return min_lr_ratio
    if schedule == "linear":
        return min_lr_ratio + (1 - min_lr_ratio) * (1 - (step - warmup_steps) / (steps - warmup_steps))
    return cosine(step, warmup_steps=warmup_steps, steps=steps, min_lr_ratio=min_lr_ratio)


def cosine(step: int, *, warmup_steps: int, steps: int, min_lr_ratio: float) -> float:
    """M = min_lr_ratio + (1 - min_lr_ratio) / 2 * (1 + cos(pi * (step - warmup_steps) / (steps - warmup_steps))).

    The whole wave: 1 at `warmup_steps`, `min_lr_ratio` at `steps`, and up again after that.
    """
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
