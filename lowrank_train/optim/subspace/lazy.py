"""When a basis moves: less and less often where it hardly turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lowrank_train.optim.transform import State, counter

UNIT = 10**9  # overlaps are kept as integers, in parts of this


@dataclass
class Lazy:
    """The interval grows where the mean of the last `window` overlaps between successive bases reaches `threshold`.

    Q-GaLore's layer-adaptive refresh (arXiv 2407.08296, section 3.2). The interval starts at subspace.every, grows by
    `growth` at every move that finds the mean at or above the threshold, and does not shrink. Each matrix has its own.

    measure="subspace": (rho - R/d) / (1 - R/d), rho = ||B_old^T B_new||_F^2 / R: 1 for the same space, 0 for what two
        random spaces of R of d dimensions share. Does not depend on the signs or the order of the vectors.
    measure="published": the cosine of the first vectors, with its sign, which is LAPACK's whim; and moves fall on
        multiples of the interval, so that the first one after a growth may come early.
    """

    threshold: float = 0.4  # Q-GaLore's cos_threshold; above 1 the interval never grows
    window: int = 5  # Q-GaLore's queue_size
    growth: float = 2.0  # Q-GaLore's gamma_proj
    longest: int | None = None  # updates: the interval grows no further; none: without end, as published
    measure: Literal["subspace", "published"] = "subspace"

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("growth", 1), ("longest", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"strategy.refresh.{name} is {value}; it must be at least {least}")

    def init(self, every: int) -> State:
        """Interval and overlaps, integers only."""
        state: State = {f"overlap_{place}": 0 for place in range(self.window)}
        return state | {"interval": every}

    def measured(self, coefficients: Tensor, dimension: int) -> float:
        """How little a basis has turned, from B_new^T B_old (R, R), or its transpose, of bases (dimension, R)."""
        if self.measure == "published":
            return float(coefficients[0, 0])
        rank = len(coefficients)
        if rank == dimension:  # the whole space cannot turn
            return 1.0
        chance = rank / dimension
        return min(1.0, (float(coefficients.square().sum()) / rank - chance) / (1 - chance))

    def remember(self, overlap: float, state: State) -> None:
        """Put the newest overlap in the place of the oldest; `refreshes` counts the moves before this one."""
        state[f"overlap_{(counter(state, 'refreshes') - 1) % self.window}"] = round(overlap * UNIT)

    def next_move(self, state: State, updates_done: int) -> int:
        """The update before which the basis moves again, and the interval; `refreshes` includes the move just made."""
        interval = counter(state, "interval")
        total = sum(counter(state, f"overlap_{place}") for place in range(self.window))
        full = counter(state, "refreshes") > self.window
        if full and total >= self.threshold * UNIT * self.window:
            grown = int(interval * self.growth)
            state["interval"] = interval = grown if self.longest is None else max(interval, min(grown, self.longest))
        if self.measure == "published":
            return (updates_done // interval + 1) * interval
        return updates_done + interval
