"""Rules about several devices, each with the whole model (DDP): what is averaged over them, and when."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import value_of, world_size
from lowrank_train.config.zero_checks import OTHERWISE, ZERO


def replicated(config: RunConfig) -> bool:
    """Whether several devices train, each with the whole model."""
    return world_size(config) > 1 and config.trainer.strategy in ("auto", "ddp")


def replication_faults(config: RunConfig) -> Iterator[str]:
    """What goes with whole models alone, and trainer.reduce=projected where it has no meaning or nothing to gain."""
    several = world_size(config) > 1
    if config.trainer.strategy.startswith(ZERO) and value_of(config, "strategy.blocks.inactive") == "none":
        yield (
            "strategy.blocks.inactive=none: changes which tensors ask for a gradient, and trainer.strategy="
            f"{config.trainer.strategy} adds up those of the tensors that asked at the start; {OTHERWISE}, or "
            "strategy.blocks.inactive=sign"
        )
    if config.trainer.reduce != "projected":
        return
    key, strategy = "trainer.reduce=projected", config.strategy
    otherwise = "use trainer.reduce=gradients"
    if not several:
        yield f"{key}: one device has nobody to average with; use trainer=ddp, or trainer.reduce=gradients"
    elif not replicated(config):
        yield (
            f"{key}: is for devices that have the whole gradient, and trainer.strategy={config.trainer.strategy} gives "
            f"each a share of it; use trainer=ddp, or trainer.reduce=gradients"
        )
    if strategy.subspace is None:
        yield f"{key}: strategy {strategy.name} has no subspace into which gradients could be projected; {otherwise}"
    elif strategy.feedback is not None:
        yield (
            f"{key}: strategy.feedback keeps what the subspace leaves out of the whole gradient, so that all of it "
            f"would travel; {otherwise}, or ~strategy.feedback"
        )
    if config.optim.grad_clip is not None and config.optim.clip_norm_of == "full":
        yield (
            f"optim.grad_clip={config.optim.grad_clip}: the norm of the mean gradient is not known where small ones "
            f"are averaged ({key}); use optim.clip_norm_of=projected, optim.grad_clip=null, or trainer.reduce=gradients"
        )
