"""Which parameters a list of name patterns means, and the slots that tell the rules what they serve."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.optim.transform import Slot

NamedParameters = Sequence[tuple[str, Tensor]]


def matched_names(
    names: Sequence[str], patterns: Iterable[str], key: str, what: str = "parameter"
) -> tuple[set[str], list[str]]:
    """The names that any pattern (a name, or a glob) matches; and for each pattern that matches none, what is wrong.

    `key` is what the patterns' list is called where the user wrote it, `what` what the names are of.
    """
    faults, chosen = [], set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            faults.append(f"{key} pattern {pattern!r} matched no {what}; nearest: {', '.join(nearest)}")
        chosen.update(matched)
    return chosen, faults


def slots_for(params: NamedParameters, *, seed: int, state_dtype: torch.dtype | None = None) -> list[Slot]:
    """One slot a parameter of a group; `state_dtype` None: each parameter's own."""
    group = tuple(name for name, _ in params)
    rank_of = {name: index for index, name in enumerate(sorted(group))}
    return [
        Slot(
            name=name,
            seed=seed_from_name(seed, name),
            phase=rank_of[name] / len(params),
            dtype=state_dtype or param.dtype,
            group=group,
        )
        for name, param in params
    ]
