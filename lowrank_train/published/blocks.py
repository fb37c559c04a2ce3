"""The methods that train some tensors at a time, from their published options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_train.optim.blocks import LAYER_PATTERNS, Blocks, BlockSchedule
from lowrank_train.published.options import Options, Recipe, torch_adam


def frugal_block(options: Options) -> Recipe:
    """FRUGAL with whole tensors as blocks. Its random order draws anew at every switch, ours visits all in turn."""
    adam = torch_adam(options)
    order: Any = options.choose("block_order", "random", ("random", "ascending", "descending", "mirror"))
    inactive: Any = options.choose("inactive_update_rule", "sign_sgd", ("sign_sgd", "sgd", "no"))
    scale = options.take("inactive_lr_scale", 1.0)
    if inactive == "no" and options.published:  # the published code decays inactive tensors all the same
        inactive, scale = "sgd", 0.0
    schedule = BlockSchedule(
        by="tensors",
        density=options.take("density", 0.25),
        every=options.take("update_gap", 200),
        order="uniform" if options.published and order == "random" else order,
        inactive={"sign_sgd": "sign", "sgd": "sgd", "no": "none"}[inactive],  # type: ignore[arg-type]
        inactive_scale=scale,
        scale=options.take("proj_params_lr_scale", 1.0),
        on_switch="reset" if options.take("reset_statistics", True) else "keep",
    )
    return Recipe(Blocks(adam, schedule), adam, options.take("weight_decay", 0.0))


def badam(options: Options) -> Recipe:
    """BAdam. `block_prefix_list` has a list of parts of names for each block; without it a block is a layer.

    The published code gives the first block one update less than the others, and moves down unless told otherwise.
    `active_modules` are trained always, with state that lasts (the published code drops it at every switch too).
    """
    adam = torch_adam(options)
    given = options.take("block_prefix_list", None)
    always = tuple(f"*{part}*" for part in options.take("active_modules", ()))
    for name in ("include_embedding", "include_lm_head"):
        options.refuse(name, "adds a block; list all blocks in block_prefix_list instead")
    moves: Any = options.choose(
        "switch_mode", "descending" if options.published else "random", ("random", "ascending", "descending")
    )
    patterns = None if given is None else [[f"*{part}*" for part in block] for block in given]
    schedule = BlockSchedule(
        by="layers",
        patterns=patterns,
        count=1,
        every=options.take("switch_block_every", 50 if options.published else 100),
        order=moves,
    )
    return Recipe(
        Blocks(adam, schedule, head_start=1 if options.published else 0),
        adam,
        options.take("weight_decay", 0.0),
        project=LAYER_PATTERNS if patterns is None else tuple(p for block in patterns for p in block),
        trained_rest=always,
    )


def lisa(options: Options) -> Recipe:
    """LISA: `lisa_activated_layers` layers, drawn every `lisa_interval_steps` updates; the rest is trained always."""
    adam = torch_adam(options)
    schedule = BlockSchedule(
        by="layers",
        count=options.take("lisa_activated_layers", 2),
        every=options.take("lisa_interval_steps", 20),
        order="uniform",
        on_switch="keep",
    )
    blocks = Blocks(adam, schedule)
    return Recipe(blocks, adam, options.take("weight_decay", 0.0), project=LAYER_PATTERNS)


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "frugal_block": frugal_block,
    "badam": badam,
    "lisa": lisa,
}
