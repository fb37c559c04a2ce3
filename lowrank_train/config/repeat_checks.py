"""Rules about repeated updates, which go along the last change of all that is trained."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_train.config.fsdp_checks import sharded
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import value_of, world_size
from lowrank_train.config.zero_checks import zero_stage

WITHOUT = "or ~strategy.repeat"


def repeat_faults(config: RunConfig) -> Iterator[str]:
    """Where there is no whole change to go along, or no turn would come."""
    if config.strategy.repeat is None:
        return
    if sharded(config) or zero_stage(config) is not None:
        yield (
            f"trainer.strategy={config.trainer.strategy}: leaves each device a part of what is trained, and "
            f"strategy.repeat goes along the change of all of it; use trainer=ddp, {WITHOUT}"
        )
    if value_of(config, "strategy.weights.across_ranks") and world_size(config) > 1:
        yield (
            "strategy.weights.across_ranks=true: each device has weights of its own, and strategy.repeat moves those "
            f"that all share; use strategy.weights.across_ranks=false, {WITHOUT}"
        )
    if config.precision.int8_group is not None:
        yield (
            f"precision.int8_group={config.precision.int8_group}: an update moves codes by whole steps, in which there "
            f"is no direction for strategy.repeat to go on in; use precision=bf16, {WITHOUT}"
        )
    every, steps = value_of(config, "strategy.repeat.every"), config.trainer.steps
    if isinstance(every, int) and every > steps:
        yield (
            f"strategy.repeat.every={every}: no update would be repeated in trainer.steps={steps} updates; use a "
            "smaller one"
        )
