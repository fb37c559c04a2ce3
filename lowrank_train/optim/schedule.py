"""Learning-rate schedules as a multiplier of the base rate, in closed form from the number of updates done."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["cosine", "linear", "constant"]


def multiplier(schedule: ScheduleName, step: int, *, warmup_steps: int, steps: int, min_lr_ratio: float = 0.0) -> float:
    """The factor on the learning rate of update number `step` (0-based: updates already done).

    Linear warm-up from 0 (the first update of a warm-up has rate 0, as in transformers and in GaLore's
    training_utils.py), then a cosine or a line down to `min_lr_ratio` at `steps`, and that value ever after.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * shape
