"""The callback that runs the strategy's events after each update, before anything is evaluated or saved."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
import torch
from torch import nn

from lowrank_train.nn.events import Event
from lowrank_train.nn.reparam import layers_of
from lowrank_train.report.console import Console
from lowrank_train.train.module import RunModule
from lowrank_train.train.recorder import as_ours
from lowrank_train.train.replicas import parts_of


class EventRunner(L.Callback):
    """Comes before the callbacks that record and save: a checkpoint holds what the events of its update left behind."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # a micro-batch in the middle of an update
            return
        self._step = trainer.global_step
        module = as_ours(pl_module)
        happened = run_events(module, self._step)
        module.events = [event.name for event in happened if not event.quiet]
        if module.events:
            self._console.say(f"step: {self._step}  {', '.join(module.events)}")


def run_events(module: RunModule, step: int) -> list[Event]:
    """Everything that is due after update number `step`, alike on all ranks; what has happened, in order."""
    if module.sharded:  # imported where it is needed: FSDP2 takes a second
        from lowrank_train.train.whole_layers import whole_one_by_one

        layerwise = whole_one_by_one(module.model, module.optimizer, equalize_layers)
        return module.strategy.run_events(step, module.model, module.optimizer, layerwise)
    loss = functools.partial(held_out_loss, module)
    happened = module.strategy.run_events(step, module.model, module.optimizer, held_out_loss=loss)
    if module.trainer.world_size > 1 and any(event.restructures or not event.quiet for event in happened):
        equalize_layers(module.model)
    return happened


def held_out_loss(module: RunModule) -> float:
    """Mean loss on the held-out rows of all ranks, with the model as it is; the same number on each of them."""
    model, device, sums = module.model, module.device, torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=module.config.precision.compute == "bf16-mixed"),
    ):
        for batch in module.held_out:
            loss_sum, targets = module.head.loss(model, {key: value.to(device) for key, value in batch.items()})
            sums += torch.tensor([float(loss_sum), targets], dtype=torch.float64)
    model.train(was_training)
    loss_sum, targets = module.sum_over_ranks(sums).tolist()
    return loss_sum / max(1.0, targets)


def equalize_layers(model: nn.Module) -> None:
    """Give every rank the first one's layers: a decomposition may differ in its last digits between devices.

    What is each rank's own stays so. Not after quiet events that leave the parameters what they are: what happens at
    nearly every update treats numbers one by one, and is the same anywhere.
    """
    for layer in layers_of(model).values():
        own = set(layer.rank_local())
        shared = [param for name, param in layer.named_parameters() if name not in own]
        for tensor in (*shared, *layer.buffers()):
            for part in parts_of(tensor):
                torch.distributed.broadcast(part, src=0)
