"""Rules about FSDP2, under which each device holds some rows of every parameter."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import world_size

OTHERWISE = "trainer=ddp, or trainer.devices=1 trainer.num_nodes=1"


def sharded(config: RunConfig) -> bool:
    """Whether the parameters are cut up among the devices; one alone has nobody to share with."""
    return config.trainer.strategy == "fsdp" and world_size(config) > 1


def fsdp_faults(config: RunConfig) -> Iterator[str]:
    """What a configuration asks for that rows of parameters cannot give."""
    if not sharded(config):
        return
    key = "trainer.strategy=fsdp"
    if config.precision.int8_group is not None:
        yield (
            f"precision.int8_group={config.precision.int8_group}: keeps codes with scales, which {key} cannot cut into "
            f"rows; use precision=bf16, or {OTHERWISE}"
        )
    if config.model.compile:
        yield (
            f"model.compile=true: makes one graph of the layers, and {key} gathers their parameters in between; use "
            f"model.compile=false, or {OTHERWISE}"
        )
