"""Rules about the strategy: what its parts need of each other, and the moments of stepping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_train.config.schema import Part, RunConfig
from lowrank_train.config.shapes import smallest_side
from lowrank_train.config.weights_checks import weights_faults


def micro_batches(config: RunConfig) -> int:
    """Micro-batches per update on each device."""
    rows = config.trainer.batch_size * world_size(config)
    return max(1, (config.trainer.total_batch_size or rows) // rows)


def world_size(config: RunConfig) -> int:
    """Devices over all nodes."""
    return config.trainer.devices * config.trainer.num_nodes


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key; None where a part is absent or has no such argument."""
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else getattr(node, name, None)
    return node


def strategy_faults(config: RunConfig) -> Iterator[str]:
    """What the parts of a strategy lack of each other, and numbers that the model has no room for."""
    strategy = config.strategy
    patterns = "[*.self_attn.*.weight,*.mlp.*.weight]"
    if not strategy.rest:
        yield "strategy.rest: is missing; choose the rule for all other parameters with strategy/rest=adam"
    if strategy.blocks is not None and strategy.inner is None:
        yield "strategy.blocks: has no rule to switch; choose one with strategy/inner=adamw, or ~strategy.blocks"
    if strategy.inner is not None and not strategy.select:
        yield f"strategy.select: names no parameter for strategy.inner; give patterns such as {patterns}"
    if strategy.select and strategy.inner is None:
        yield (
            "strategy.select: has no meaning without a rule for what it selects; add strategy/inner=NAME, or "
            "strategy.select=[]"
        )
    yield from weights_faults(config)
    if strategy.subspace is None:
        for name in ("lift", "feedback", "refresh"):
            if getattr(strategy, name) is not None:
                yield (
                    f"strategy.{name}: has no meaning without a subspace; add strategy/subspace=randomized, or "
                    f"~strategy.{name}"
                )
        return
    for name in (name for name in ("inner", "lift") if getattr(strategy, name) is None):
        yield f"strategy.{name}: is missing beside strategy.subspace; choose one with strategy/{name}=NAME"
    yield from _subspace(config, strategy.subspace)


def _subspace(config: RunConfig, subspace: Part) -> Iterator[str]:
    """The size of a subspace, and what its moves mean for the moments."""
    rank, density = subspace.get("rank"), subspace.get("density")
    if rank is not None and density is not None:
        yield (
            f"strategy.subspace.rank={rank}: says the same as strategy.subspace.density={density} in another way; give "
            "one of them"
        )
    if subspace.get("every") == 1 and config.strategy.on_refresh == "reset":
        yield (
            "strategy.on_refresh=reset: the subspace moves at every update, so that no moment would outlive one; use "
            "strategy.on_refresh=keep or rotate, or a larger strategy.subspace.every"
        )
    # coordinates count rows, columns or entries
    smallest = None if "of" in subspace else smallest_side(config, config.strategy.select)
    if isinstance(rank, int) and smallest is not None and rank > smallest[0]:
        yield (
            f"strategy.subspace.rank={rank}: is above {smallest[0]}, the short side of {smallest[1]} "
            f"({smallest[2][0]} x {smallest[2][1]}) in model {config.model.name}"
        )


def stepping_faults(config: RunConfig) -> Iterator[str]:
    """What cannot be had together when gradients are freed before the step."""
    when, clip, accumulated = config.strategy.when, config.optim.grad_clip, micro_batches(config)
    has_subspace = config.strategy.subspace is not None
    if clip is not None and config.optim.clip_norm_of == "projected" and not has_subspace:
        yield "optim.clip_norm_of=projected: there is no subspace to project into; write optim.clip_norm_of=full"
    if clip is None and config.optim.clip_norm_of == "projected":
        yield "optim.clip_norm_of=projected: nothing is clipped; give optim.grad_clip=1.0 or leave it out"
    if when == "after_backward":
        return
    if when == "project_in_backward" and not has_subspace:
        yield (
            f"strategy.when={when}: strategy {config.strategy.name} has no subspace; use strategy.when=in_backward or "
            "after_backward"
        )
    if when == "project_in_backward" and config.strategy.feedback is not None and accumulated > 1:
        yield (
            f"strategy.when={when}: compresses each of {accumulated} micro-batches by itself, and strategy.feedback "
            "would add the error to every one; use strategy.when=after_backward, or a single micro-batch"
        )
    if when == "in_backward" and accumulated > 1:
        rows = config.trainer.total_batch_size
        yield (
            f"strategy.when={when}: updates a matrix in every backward pass, so it cannot add up the {accumulated} "
            f"micro-batches of trainer.total_batch_size={rows}; use strategy.when=project_in_backward, which adds "
            f"up in the subspace, or one micro-batch: trainer.total_batch_size={config.trainer.batch_size}"
        )
    if when == "in_backward" and clip is not None:
        yield (
            f"optim.grad_clip={clip}: the global norm is known only after the last gradient, and "
            f"strategy.when={when} has used the first by then; use strategy.when=project_in_backward (the norm of "
            "a single micro-batch is exact there) or after_backward, or optim.grad_clip=null"
        )
    if when == "project_in_backward" and clip is not None and accumulated > 1 and config.optim.clip_norm_of == "full":
        yield (
            f"optim.grad_clip={clip}: the norm of a sum of {accumulated} gradients cannot be known when each was freed "
            f"by strategy.when={when}; use optim.clip_norm_of=projected, strategy.when=after_backward, or a single "
            "micro-batch"
        )
