"""Published option names: taken one by one, and what nobody takes is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
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

    def finish(self) -> None:
        """Raise ValueError for options that nobody took."""
        if self._given:
            name = next(iter(self._given))
            nearest = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{self.method} has no option {name!r}{hint} It takes: {', '.join(sorted(self._known))}")


@dataclass
class Recipe:
    """What a method is made of: the rule for projected matrices, the rule for the rest, and the decay."""

    projected: Transform
    rest: Transform
    weight_decay: float = 0.0


def transformers_adam(options: Options, eps: float = 1e-6) -> Adam:
    """The AdamW of the GaLore family."""
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


def galore_arguments(options: Options) -> dict[str, Any]:
    """rank, update_proj_gap and proj_type."""
    return {
        "rank": options.take("rank", 128),
        "every": options.take("update_proj_gap", 200),
        "side": options.take("proj_type", "std"),
    }
