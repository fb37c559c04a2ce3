"""Rules about DeepSpeed's ZeRO, which hands the update rule flat shards in place of matrices."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig

ZERO = "deepspeed_zero"  # and the number of the stage: 1 shares out the state, 2 the gradients too, 3 the weights too
OTHERWISE = "use trainer=ddp or trainer=fsdp"


def zero_stage(config: RunConfig) -> int | None:
    """The stage of ZeRO; None under another way of working together."""
    _, found, stage = config.trainer.strategy.partition(ZERO)
    return int(stage) if found else None


def require_package(config: RunConfig) -> None:
    """UserError where DeepSpeed is not installed, which says nothing of what runs with it."""
    if zero_stage(config) is not None and importlib.util.find_spec("deepspeed") is None:
        key = f"trainer.strategy={config.trainer.strategy}"
        raise UserError(f"{key}: the package deepspeed is not installed; pip install -e '.[deepspeed]', or {OTHERWISE}")


def zero_faults(config: RunConfig) -> Iterator[str]:
    """What a configuration asks for that flat shards of float32 numbers cannot give."""
    if zero_stage(config) is None:
        return
    key, strategy, precision = f"trainer.strategy={config.trainer.strategy}", config.strategy, config.precision
    if config.trainer.accelerator == "cpu":
        yield f"{key}: DeepSpeed trains on GPUs only, and trainer.accelerator is cpu; {OTHERWISE}, which work there too"
    if zero_stage(config) == 3 and config.model.compile:
        yield (
            f"model.compile=true: makes one graph of the layers, and {key} gathers their parameters in between; use "
            "model.compile=false, or trainer=ddp"
        )
    if strategy.subspace is not None or strategy.blocks is not None:
        part = "subspace" if strategy.subspace is not None else "blocks"
        yield (
            f"{key}: hands the optimizer flat pieces of many tensors, and strategy {strategy.name} has "
            f"strategy.{part}, which needs whole ones; {OTHERWISE}, or a strategy that goes number by number such as "
            "full or lora"
        )
    if strategy.merge is not None:
        yield (
            f"{key}: keeps each device a share of the moments, and strategy.merge changes those of whole matrices; "
            f"{OTHERWISE}, or ~strategy.merge"
        )
    if strategy.storage is not None:
        yield (
            f"{key}: hands the optimizer flat pieces of many tensors, and strategy.storage goes by tensors, of which "
            "small ones stay in float32; use ~strategy.storage, or trainer=ddp or trainer=fsdp"
        )
    if strategy.when != "after_backward":
        yield (
            f"strategy.when={strategy.when}: {key} takes each gradient out of the backward pass itself to share it "
            "out; use strategy.when=after_backward, or trainer=ddp or trainer=fsdp"
        )
    if precision.int8_group is not None:
        yield f"precision.int8_group={precision.int8_group}: {key} shares out floats, not codes; {OTHERWISE}"
    elif precision.weights != "float32":
        yield (
            f"precision.weights={precision.weights}: {key} updates float32 copies of the weights, and a checkpoint "
            "would hold the rounded ones alone; use precision=bf16_mixed, or trainer=ddp or trainer=fsdp"
        )
