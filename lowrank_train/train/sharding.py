"""FSDP2 under Lightning: each rank holds its rows of every parameter, and a layer is whole while it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy as LightningStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lowrank_train.models import AS_FORWARD, blocks_of, common_to_blocks
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.activity import wake
from lowrank_train.train.checkpoint_io import WEIGHTS_PREFIX
from lowrank_train.train.sharded_io import load_own

Result = TypeVar("Result")

COMMON = "common_to_blocks"  # a name that no model has


class RestoredAsUnderDDP:
    """A strategy of Lightning's that loads checkpoints when plain DDP does, model first and then the optimizer."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True


class ShardedStrategy(RestoredAsUnderDDP, ModelParallelStrategy):
    """Lightning's FSDP2 with our checkpoint folders."""

    def __init__(self, devices: int, *, backend: str | None) -> None:
        """`backend` of the process group; None: the accelerator's own."""
        super().__init__(data_parallel_size=devices, tensor_parallel_size=1, process_group_backend=backend)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return dict(inner.state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)  # on every rank: each writes its rows

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        like = {name.removeprefix(WEIGHTS_PREFIX): one for name, one in self.lightning_module.state_dict().items()}
        weights, state = load_own(Path(checkpoint_path), like, self.device_mesh["data_parallel"])
        return {**state, "state_dict": {WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()}}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        LightningStrategy.load_model_state_dict(self, checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        LightningStrategy.load_optimizer_state_dict(self, checkpoint)


def shard_(model: nn.Module, mesh: DeviceMesh, *, autocast: bool) -> None:
    """Cut the parameters into rows, in place: each block of layers is a unit, what lies around them or is common to
    several of them another.

    A model that was built in main memory moves to the devices of `mesh` a unit at a time. autocast: dense blocks are
    gathered in bfloat16, to which autocast would round their matrices anyway, and their gradients are averaged in
    float32; reparametrised layers, which compute with their parameters before any product, are gathered as they are.
    """
    for param in model.parameters():
        wake(param)  # a row shard is another tensor; the optimizer puts those to sleep again whose state says so
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    common = common_to_blocks(model)
    for block in blocks_of(model):
        dense = autocast and not layers_of(block)
        policy = narrow if dense else MixedPrecisionPolicy()
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(common) or None)
    if common:  # the model takes in what is its own, or its blocks' that are no units
        model.add_module(COMMON, nn.ParameterList(common))
    fully_shard(model, mesh=mesh)
    if common:
        delattr(model, COMMON)
    setattr(model, AS_FORWARD, MethodType(_call, model))
    register_fsdp_forward_method(model, AS_FORWARD)
    # The first pass settles in which dtype a unit's gradients are averaged, by those that ask for one: all, as yet.
    getattr(model, AS_FORWARD)(lambda: None)
    gather_no_more(model)


def gather_no_more(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left whole: the parameters are their rows again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _call(model: nn.Module, function: Callable[[], Result]) -> Result:
    return function()
