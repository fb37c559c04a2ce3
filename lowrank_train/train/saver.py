"""The callback that saves: every few updates, at the end, and when a signal asks the run to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lowrank_train.checkpoint import checkpoint_folder
from lowrank_train.config.errors import EXIT_DISK_FULL, EXIT_TERMINATED, RunStopped
from lowrank_train.report.console import Console
from lowrank_train.train.checkpoint_io import FolderCheckpoints
from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.module import RunModule
from lowrank_train.train.recorder import as_ours, is_last_update
from lowrank_train.train.run_state import Stopwatch


class Saver(L.Callback):
    """Comes after the callback that records, and ends the run when it has to end early."""

    def __init__(
        self,
        folder: Path,
        checkpoints: FolderCheckpoints,
        interrupts: Interrupts,
        stopwatch: Stopwatch,
        console: Console,
    ) -> None:
        self._folder = folder
        self._checkpoints = checkpoints
        self._interrupts = interrupts
        self._stopwatch = stopwatch
        self._console = console
        self._step = -1
        self.stopped_by_signal = False

    @property
    def signal_name(self) -> str:
        """The signal this rank got; another rank may have got it alone."""
        return self._interrupts.received.name if self._interrupts.received is not None else "another rank"

    @property
    def exit_code(self) -> int:
        return self._interrupts.exit_code if self._interrupts.received is not None else EXIT_TERMINATED

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        module = as_ours(pl_module)
        settings = module.config.trainer
        last = is_last_update(trainer, settings.steps)
        self.stopped_by_signal = module.any_rank(self._interrupts.received is not None)
        if last or self.stopped_by_signal or (settings.save_every_steps and step % settings.save_every_steps == 0):
            self._save(trainer, module, must_succeed=last or self.stopped_by_signal)
        if last or self.stopped_by_signal:
            trainer.should_stop = True
        self._stopwatch.leave_out_until_now()

    def _save(self, trainer: L.Trainer, module: RunModule, *, must_succeed: bool) -> None:
        path = checkpoint_folder(self._folder, self._step)
        trainer.save_checkpoint(path, weights_only=False)
        if not module.any_rank(self._checkpoints.failure is not None):
            module.last_checkpoint_step = self._step
            if trainer.is_global_zero:
                self._checkpoints.keep_newest(self._folder, module.config.trainer.keep_checkpoints, step=self._step)
            return
        kept = module.last_checkpoint_step
        left = f"the last checkpoint is of step {kept:,}" if kept else "there is no checkpoint yet"
        reason = f"step {self._step:,} could not be saved, the disk is full: {self._checkpoints.failure}; {left}"
        if must_succeed:
            raise RunStopped(
                f"{reason}.\nMake room in {self._folder} and run the same command again: it goes on from there.",
                EXIT_DISK_FULL,
            )
        self._console.warn(f"{reason}; training goes on")
