"""The callback that runs the strategy's events after each update, before anything is evaluated or saved."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lowrank_train.nn.events import Event
from lowrank_train.nn.reparam import layers_of
from lowrank_train.report.console import Console
from lowrank_train.train.module import RunModule
from lowrank_train.train.recorder import as_ours


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
    happened = module.strategy.run_events(step, module.model, module.optimizer)
    if module.trainer.world_size > 1 and not all(event.quiet for event in happened):
        equalize(module)
    return happened


def equalize(module: RunModule) -> None:
    """Give every rank the first one's layers: a decomposition may differ in its last digits between devices.

    What is each rank's own stays so. Quiet events are left out: what happens at nearly every update treats numbers one
    by one, and is the same anywhere.
    """
    for layer in layers_of(module.model).values():
        own = set(layer.rank_local())
        shared = [param for name, param in layer.named_parameters() if name not in own]
        for tensor in (*shared, *layer.buffers()):
            torch.distributed.broadcast(tensor.data, src=0)
