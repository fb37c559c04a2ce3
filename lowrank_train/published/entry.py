"""Every method as a plain torch optimizer, under the option names of its published code."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.optim.flora import Flora
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.optimizer import Group, TransformOptimizer
from lowrank_train.optim.transform import Slot
from lowrank_train.published import methods
from lowrank_train.published.options import Options, Recipe

METHODS: dict[str, Callable[[Options], Recipe]] = {**methods.METHODS}
"""Name -> what the method is made of; a family a file."""

BasisSourceByName = Callable[[str, int, Tensor], Any]
"""(parameter name, 1-based update, gradient) -> the basis in force from that update on, or None for one's own."""

DEFAULT_PROJECT = ("*attn*.weight", "*attention*.weight", "*mlp*.weight")
"""Attention and MLP linears, as every paper of the family projects them."""


def optimizer(
    method: str,
    named_parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    project: Iterable[str] | None = None,
    published: bool = False,
    basis_source: BasisSourceByName | None = None,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Any method as a plain torch optimizer, under the option names of its published code."""
    if method not in METHODS:
        nearest = difflib.get_close_matches(method, METHODS, n=1)
        raise ValueError(f"there is no method {method!r}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    pairs = list(named_parameters.named_parameters() if isinstance(named_parameters, nn.Module) else named_parameters)
    pairs = [(name, param) for name, param in pairs if param.requires_grad]
    patterns = list(DEFAULT_PROJECT if project is None else project)
    chosen = [pair for pair in pairs if any(fnmatch.fnmatchcase(pair[0], pattern) for pattern in patterns)]
    names = {name for name, _ in chosen}
    taken = Options(method, options, published)
    recipe = METHODS[method](taken)
    taken.finish()

    def slots(params: list[tuple[str, Tensor]]) -> list[Slot]:
        return [
            Slot(name, seed_from_name(seed, name), index / len(params), param.dtype)
            for index, (name, param) in enumerate(params)
        ]

    rest = [pair for pair in pairs if pair[0] not in names]
    groups = [Group("projected", recipe.projected, chosen, slots(chosen))] if chosen else []
    groups += [Group("rest", recipe.rest, rest, slots(rest))] if rest else []
    if basis_source is not None and isinstance(recipe.projected, InSubspace | Flora):
        by_seed = {slot.seed: slot.name for slot in slots(chosen)}
        moving = recipe.projected.subspace if isinstance(recipe.projected, InSubspace) else recipe.projected
        moving.source = lambda s, update, grad: basis_source(by_seed[s], update, grad)
    return TransformOptimizer(groups, lr=lr, weight_decay=recipe.weight_decay)
