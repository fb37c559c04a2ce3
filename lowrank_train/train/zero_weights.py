"""ZeRO's stage 3: weights that lie in parts on all devices, gathered where they are used, and whole in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_train.models import AS_FORWARD, decoder_and_head
from lowrank_train.nn.reparam import layers_of

Result = TypeVar("Result")


def share_out_(module: nn.Module, model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Cut the parameters of `module`, in place, and have each module gather what its forward pass uses.

    `model`, a part of `module` that may have been built in main memory, moves to `device` a parameter at a time.
    DeepSpeed gathers for a forward pass the parameters that the module itself has. A reparametrised layer uses those
    of its parts too, and a loss in chunks that of the head in place of the model's own forward pass.
    """
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    module.to(device)  # the buffers
    for layer in layers_of(model).values():
        own = set(layer.parameters(recurse=False))
        for param in layer.parameters():
            if param not in own:
                deepspeed.zero.register_external_parameter(layer, param)
    parts = decoder_and_head(model)
    if parts is not None:
        deepspeed.zero.register_external_parameter(model, parts[1].weight)
    setattr(model, AS_FORWARD, MethodType(_call, model))


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Of a module in parts, in main memory on the first rank; others get nothing. Called on all of them at once."""
    import deepspeed

    wholes: dict[Tensor, Tensor] = {}
    found: dict[str, Tensor] = {}
    first = torch.distributed.get_rank() == 0
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor not in wholes:  # a tied one has two names
            with deepspeed.zero.GatheredParameters(tensor):
                wholes[tensor] = tensor.detach().cpu().clone() if first else tensor
        found[name] = wholes[tensor]
    return found if first else {}


def let_go(engine: Any) -> None:
    """Free what a DeepSpeed engine holds whose module is used no more.

    Its hooks on gradients would keep it. Under stage 3 so would a stack of modules and a table of what is released
    after which of them, which DeepSpeed keeps for a whole process and takes nothing out of.
    """
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        FWD_MODULE_STACK.clear()
        (cached,) = Coordinator._PartitionedParameterCoordinator__params_to_release.__closure__
        cached.cell_contents.cache_clear()


def _call(model: nn.Module, function: Callable[[], Result]) -> Result:
    """What `function` returns, called where DeepSpeed's hooks take it for the forward pass of `model`."""
    model.forward = lambda: function()
    try:
        result: Result = model()
    finally:
        del model.forward
    return result
