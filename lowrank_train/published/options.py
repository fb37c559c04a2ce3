"""Published option names: taken one by one, and what nobody takes is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.randomized import Randomized
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Transform


class Options:
    """The options of one call; what no method takes is an error that names the nearest option."""

    def __init__(self, method: str, given: Mapping[str, Any], published: bool) -> None:
        self.method = method
        self.published = published
        self._given = dict(given)
        self._known: list[str] = []

    def take(self, name: str, default: Any) -> Any:
        """An option by its published name."""
        self._known.append(name)
        return self._given.pop(name, default)

    def choose(self, name: str, default: str, choices: Sequence[str]) -> str:
        """An option that is one of a few words. ValueError for another."""
        value = self.take(name, default)
        if value not in choices:
            raise ValueError(f"{self.method}: {name} is {value!r}; it must be one of {', '.join(choices)}")
        return str(value)

    def refuse(self, name: str, reason: str) -> None:
        """An option of the published code that can only be left off. ValueError where it is set."""
        if self.take(name, False):
            raise ValueError(f"{self.method}: {name} {reason}")

    def ignore(self, *names: str) -> None:
        """Options of the published code that change no number."""
        for name in names:
            self.take(name, None)

    def take_all(self, but: Sequence[str] = ()) -> dict[str, Any]:
        """Whatever is left but these names, for a class that knows its own options."""
        left = {name: value for name, value in self._given.items() if name not in but}
        self._given = {name: value for name, value in self._given.items() if name in but}
        return left

    def finish(self) -> None:
        """Raise ValueError for options that nobody took."""
        if self._given:
            name = next(iter(self._given))
            nearest = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "."
            raise ValueError(f"{self.method} has no option {name!r}{hint} It takes: {', '.join(sorted(self._known))}")


@dataclass
class Recipe:
    """What a method is made of: the rule for projected matrices, the rule for the rest, and the decay."""

    projected: Transform
    rest: Transform
    weight_decay: float = 0.0
    base_lr: float | None = None  # the learning rate before its schedule, where it is not the one of the call
    micro_batches: int = 1  # compressed one by one as they come, where there are several
    max_size: int | None = None  # a projected matrix with a side of this length or more goes to the rest
    project: tuple[str, ...] | None = None  # what is projected where the call does not say; None: as the papers do
    trained_rest: tuple[str, ...] = ("*",)  # of the rest; what no pattern matches is frozen


def transformers_adam(options: Options, eps: float = 1e-6) -> Adam:
    """The AdamW of the GaLore family."""
    options.ignore("no_deprecation_warning")
    return Adam(
        betas=tuple(options.take("betas", (0.9, 0.999))),
        eps=options.take("eps", eps),
        eps_inside=False,
        weight_decay_first=False,
        correct_bias=options.take("correct_bias", True),
    )


def torch_adam(options: Options, betas: tuple[float, float] = (0.9, 0.999)) -> Adam:
    """torch.optim.AdamW."""
    return Adam(betas=tuple(options.take("betas", betas)), eps=options.take("eps", 1e-8))


def leading(options: Options, **arguments: Any) -> Subspace:
    """Exact decomposition, raw signs and all at once where the published code is replayed; else our defaults."""
    if options.published:
        return Svd(signs="raw", precision="float32", **arguments)
    return Randomized(stagger=True, **arguments)


SIDES = ("std", "reverse_std", "left", "right", "full")


def galore_arguments(options: Options, kinds: Sequence[str] = SIDES) -> dict[str, Any]:
    """rank, update_proj_gap and proj_type."""
    return {
        "rank": options.take("rank", 128),
        "every": options.take("update_proj_gap", 200),
        "side": options.choose("proj_type", "std", kinds),
    }
