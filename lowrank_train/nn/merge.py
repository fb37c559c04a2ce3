"""The event that folds every layer and begins a new round, as ReLoRA and Chain of LoRA do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.nn.events import Event, Moments
from lowrank_train.nn.reparam import ReparamLinear


@dataclass
class Merge:
    """Every `every` updates all layers are folded, and the moments of what got new values are dropped or thinned.

    moments=fresh: dropped with their step counts, as a new optimizer would begin (Chain of LoRA, arXiv 2401.04151).
    moments=zero | random | magnitude: all, a random share, or the share of least magnitude becomes zero, and step
        counts go on (ReLoRA, arXiv 2307.05695); a learning rate that warms up again is needed then, since the bias
        correction of the first updates is gone: the first update is up to 6.5 times too large without.
    moments=keep: left alone.
    One mask serves all moments of a tensor; with one each, as published (independent_masks), a first moment may be kept
    whose second is gone, and that weight jumps by hundreds of learning rates.
    """

    every: int = 400  # updates
    delay: int = 0  # updates after each multiple of `every`; ReLoRA's code has 1, the update whose rate is 0
    moments: Literal["fresh", "zero", "random", "magnitude", "keep"] = "fresh"
    share: float = 0.9  # random, magnitude: of the numbers that become zero; published: 0.999 random, 0.8-0.9 magnitude
    moments_every: int | None = None  # updates, as `every`; null: at every merge
    independent_masks: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"strategy.merge.every is {self.every}; it must be at least 1")
        if not 0 <= self.delay < self.every:
            raise ValueError(f"strategy.merge.delay is {self.delay}; it must lie in [0, strategy.merge.every)")
        if not 0 <= self.share <= 1:
            raise ValueError(f"strategy.merge.share is {self.share}; it must lie in [0, 1]")
        if self.moments_every is not None and self.moments_every < 1:
            raise ValueError(f"strategy.merge.moments_every is {self.moments_every}; it must be at least 1")

    @property
    def thins(self) -> bool:
        """Whether some moments become zero while the step counts go on."""
        return self.moments in ("zero", "random", "magnitude")

    def events(self, seed: int, begins_after_steps: int = 0) -> list[Event]:
        """The merge, and the thinning of moments where it has its own period; counted from the end of a warm start."""
        first = begins_after_steps + self.delay

        def fold(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
            for layer in layers.values():
                layer.fold_(number)

        def thin(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
            for name, layer in layers.items():
                for param in layer.renewed():
                    local = next(key for key, value in layer.named_parameters() if value is param)
                    self._thin(param, moments, seed_from_name(seed, f"{name}.{local}/moments {number}"))

        period = self.moments_every or self.every
        events = [Event("merge", fold, first + self.every, self.every)]
        if self.moments != "keep":
            events.append(Event("reset of moments", thin, first + period, period, quiet=period == self.every))
        return events

    def _thin(self, param: nn.Parameter, moments: Moments, seed: int) -> None:
        if self.moments == "fresh":
            moments.forget(param)
            return
        shared: list[Tensor] = []

        def keep(name: str, moment: Tensor) -> Tensor:
            if self.moments == "zero":
                return torch.zeros_like(moment)
            if not shared or self.independent_masks:
                shared[:] = [self._mask(moment, seed_from_name(seed, name))]
            return shared[0]

        moments.mask(param, keep)

    def _mask(self, moment: Tensor, seed: int) -> Tensor:
        """One where a number stays: those above the quantile of |moment|, or each with probability 1 - share."""
        if self.moments == "magnitude":
            magnitude = moment.abs()
            return (magnitude > quantile(magnitude.float(), self.share)).to(moment.dtype)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(moment.shape, generator=generator, device="cpu")
        return (drawn > self.share).to(moment.device, moment.dtype)


def quantile(values: Tensor, share: float) -> Tensor:
    """torch.quantile, with its linear interpolation, also for more than its 2^24 numbers."""
    position = share * (values.numel() - 1)
    below = int(position)
    ordered = values.flatten()
    low = ordered.kthvalue(below + 1).values
    if position == below:
        return low
    high = ordered.kthvalue(below + 2).values
    return low + (high - low) * (position - below)
