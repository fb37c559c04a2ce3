"""Swapping the linear layers of a model for reparametrised ones, and back to plain weights."""

from __future__ import annotations

import fnmatch

import torch
from torch import nn

from lowrank_train.config.errors import UserError
from lowrank_train.nn.merge import Merge
from lowrank_train.nn.reparam import ReparamLinear, Weights, layers_of
from lowrank_train.optim.selection import matched_names
from lowrank_train.strategy_checks import row_head


def swap_in(model: nn.Module, weights: Weights, seed: int) -> None:
    """Put a reparametrised layer in place of every linear layer that `weights.modules` matches.

    A model that has been swapped already is left as it is. UserError for patterns that match no linear layer, or the
    head, and for shapes that do not fit. The head of a task that gives labels stays dense, and trained.
    """
    if layers_of(model):
        return
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen, faults = matched_names(list(linears), weights.modules, "strategy.weights.modules", "linear layer")
    if not weights.modules:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = {name for name, module in linears.items() if module is not head}
        faults = [] if chosen else ["the model has no linear layer but its head"]
    faults += _head_by_accident(model, weights, chosen)
    dense = row_head(model)
    trained = [param for name, param in model.named_parameters() if name in dense and param.requires_grad]
    only_head = {name for name in chosen if f"{name}.weight" in dense}
    if only_head and only_head == chosen:
        faults.append(f"strategy.weights.modules takes in nothing but the head, {', '.join(sorted(only_head))}")
    chosen -= only_head
    names = [name for name in linears if name in chosen]
    misfits = {name: weights.misfit((linears[name].out_features, linears[name].in_features)) for name in names}
    faults += [f"{name}: {fault}" for name, fault in misfits.items() if fault]
    if faults:
        raise UserError(faults)
    linears.clear()  # so that each can go before the next is made
    weights.swap_(model, names, seed)
    for param in trained:  # a representation may freeze all but its own
        param.requires_grad_(True)


def _head_by_accident(model: nn.Module, weights: Weights, chosen: set[str]) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name, module in model.named_modules() if module is head and head is not None]
    patterns = [pattern for name in names for pattern in weights.modules if fnmatch.fnmatchcase(name, pattern)]
    if not any(name in chosen for name in names) or any(names[0].rpartition(".")[2] in p for p in patterns):
        return []
    return [
        f"strategy.weights.modules pattern {patterns[0]!r} takes in {names[0]}, the head, which the papers leave "
        "dense; give narrower patterns, such as '*.self_attn.*' and '*.mlp.*'"
    ]


def merge_faults(merge: Merge, layers: dict[str, ReparamLinear]) -> list[str]:
    """Why these layers cannot be merged; empty if they can."""
    faults = []
    for name, layer in layers.items():
        if type(layer).fold_ is ReparamLinear.fold_:
            return [f"strategy.merge: {type(layer).__name__} has no rounds to fold; drop it with ~strategy.merge"]
        narrow = any(param.dtype.itemsize < 4 for param in layer.parameters())
        if narrow and getattr(layer.weights, "rounding", None) == "nearest":
            dtype = str(torch.bfloat16).removeprefix("torch.")
            faults.append(
                f"strategy.weights.rounding=nearest: a merge into {name} in {dtype} would lose most of a small update; "
                "use strategy.weights.rounding=compensated (2 more bytes a weight) or stochastic"
            )
            break
    return faults
