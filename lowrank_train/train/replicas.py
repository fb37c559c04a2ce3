"""Several devices with the whole model each: by torch's DDP, or by an optimizer that averages gradients itself."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lowrank_train.config.parallel_checks import replicated
from lowrank_train.config.schema import RunConfig
from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.optim.ranks import Averaged, Ranks, Together
from lowrank_train.strategy import Strategy
from lowrank_train.train.rank_local import rank_local_names


def averaged_by_whom(config: RunConfig, strategy: Strategy) -> Averaged:
    """`before`: torch's DistributedDataParallel, which averages in the backward pass while the rest of it runs.

    It adds up what asked for a gradient at the start, once all of it is there. So the optimizer averages where it uses
    gradients earlier, where compressed ones are averaged, where tensors fall asleep and wake, where parameters come and
    go, and where they are codes.
    """
    if config.trainer.reduce == "projected":
        return "projected"
    changing = strategy.when != "after_backward" or any(event.restructures for event in strategy.events)
    sleeping = config.strategy.blocks is not None and config.strategy.blocks.get("inactive") == "none"
    coded = config.precision.int8_group is not None
    return "gradients" if changing or sleeping or coded else "before"


def ranks_of(config: RunConfig, strategy: Strategy, module: nn.Module) -> Ranks:
    """For the optimizer, once the processes have found each other."""
    if not replicated(config):
        return Ranks()
    own = [module.get_parameter(name) for name in rank_local_names(module)]
    return Together(averaged_by_whom(config, strategy), own)


class Replicas(DDPStrategy):
    """Lightning's DDP, without torch's wrapper around the module where the optimizer averages."""

    def configure_ddp(self) -> None:
        module: Any = self.lightning_module  # a RunModule, which knows this file
        if averaged_by_whom(module.config, module.strategy) == "before":
            super().configure_ddp()
        else:
            send_from_first(module)


def send_from_first(module: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers, but for those that are each rank's own."""
    own = set(rank_local_names(module))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in own:
            for part in parts_of(tensor):
                dist.broadcast(part, src=0)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """What can be sent: the tensor itself, or its codes and scales."""
    return list(tensor.parts().values()) if isinstance(tensor, Int8Weight) else [tensor.data]
