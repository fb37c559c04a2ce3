"""Parameters that differ from rank to rank: left alone by DDP, and saved with copies and state of every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_train.config.errors import UserError
from lowrank_train.nn.reparam import layers_of


def rank_local_names(module: nn.Module) -> list[str]:
    """The names of these parameters in `module`."""
    return [f"{path}.{name}" for path, layer in layers_of(module).items() for name in layer.rank_local()]


def take_places(module: nn.Module, rank: int, ranks: int) -> None:
    """Tell the layers their rank, and DDP, which is going to wrap `module`, what it must neither send nor average.

    UserError where nothing is left that is to be averaged.
    """
    for layer in layers_of(module).values():
        layer.place_(rank, ranks)
    names = rank_local_names(module)
    if names:
        if not any(param.requires_grad for name, param in module.named_parameters() if name not in set(names)):
            raise UserError(
                "nothing that the devices have in common is trained, and DDP needs some of it; train more with them, "
                "such as with strategy.freeze_rest=false, or use trainer.devices=1 trainer.num_nodes=1"
            )
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def meet_ranks(module: nn.Module) -> None:
    """Before an evaluation, on all ranks at once: they may have different numbers of batches to evaluate."""
    for layer in layers_of(module).values():
        layer.meet_ranks_()


def join_copies(
    checkpoint: dict[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    gather: Callable[[Any], list[Any]],
) -> list[dict[int, Any]]:
    """Put the copies of all ranks into Lightning's dictionary, one after the other along the first dimension.

    Returns the optimizer's state of these parameters, by their number, for each rank. `gather` gives the values of all.
    """
    names = rank_local_names(module)
    if not names:
        return []
    weights, states = checkpoint["state_dict"], checkpoint.get("optimizer_states", [{"state": {}}])[0]["state"]
    local = {module.get_parameter(name) for name in names}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = [number for number, param in enumerate(params) if param in local and number in states]
    own = ({name: weights[name] for name in names}, {number: states[number] for number in numbers})
    everyones = gather(move_data_to_device(own, torch.device("cpu")))
    for name in names:
        weights[name] = torch.cat([copies[name] for copies, _ in everyones])
    return [state for _, state in everyones]


def take_own_copy(
    checkpoint: dict[str, Any], states: list[dict[int, Any]], module: nn.Module, rank: int, ranks: int
) -> None:
    """Leave this rank's own part of what join_copies() put together. UserError where other ranks saved it."""
    names = rank_local_names(module)
    if len(states) != (ranks if names else 0):
        saved = len(states) or 1
        raise UserError(
            f"the checkpoint holds the weights of {saved} device{'s' if saved > 1 else ''}, each with some of its own, "
            f"and cannot be trained on with {ranks}; use as many, trainer.devices x trainer.num_nodes = {saved}"
        )
    for name in names:
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name].chunk(ranks)[rank]
    if names:
        checkpoint["optimizer_states"][0]["state"].update(states[rank])
