"""The callback that saves: every few updates, at the end, when a signal asks to stop, and the best weights aside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L

from lowrank_train.checkpoint import PARTIAL_SUFFIX, checkpoint_folder, checkpoint_folders, checkpoint_step
from lowrank_train.config.errors import EXIT_DISK_FULL, EXIT_TERMINATED, RunStopped
from lowrank_train.report.console import Console
from lowrank_train.train.checkpoint_io import FolderCheckpoints
from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.module import RunModule
from lowrank_train.train.recorder import as_ours, is_last_update
from lowrank_train.train.run_state import Stopwatch
from lowrank_train.train.slurm import StoppedBySignal


class Saver(L.Callback):
    """Comes after the callback that records, and ends the run when it has to end early."""

    def __init__(
        self,
        folder: Path,
        checkpoints: FolderCheckpoints,
        interrupts: Interrupts,
        stopwatch: Stopwatch,
        console: Console,
        *,
        resume_from: Path | None = None,
    ) -> None:
        """`folder` takes the checkpoints; `resume_from` is the one that the run goes on from."""
        self._folder = folder
        self._resume_from = resume_from
        self._checkpoints = checkpoints
        self._interrupts = interrupts
        self._stopwatch = stopwatch
        self._console = console
        self._step = -1
        self._best_at_checkpoint: int | None = None  # what a run that goes on from there would call its best
        self.stopped_by_signal = False
        self._asked_to_come_back = False  # by Slurm, on whichever rank

    def stopped(self, then: str) -> StoppedBySignal:
        """The end of a run that a signal stopped, with what came of it in words."""
        received = self._interrupts.received
        return StoppedBySignal(
            f"stopped by {'another rank' if received is None else received.name}{then}",
            EXIT_TERMINATED if received is None else self._interrupts.exit_code,
            asked_to_come_back=self._asked_to_come_back,
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Weights that an evaluation just made up for finds best are those of the checkpoint it goes on from."""
        module = as_ours(pl_module)
        self._best_at_checkpoint = module.counters.best_evaluation.get("step")
        if not module.config.trainer.keeps_best or self._resume_from is None or self._best_at_checkpoint is None:
            return
        best = checkpoint_folder(self._folder, self._best_at_checkpoint, "best")
        made_now = checkpoint_step(self._resume_from) == self._best_at_checkpoint and not best.exists()
        if made_now and trainer.is_global_zero:
            aside = best.with_name(best.name + PARTIAL_SUFFIX)
            shutil.copytree(self._resume_from, aside)
            aside.rename(best)

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
        if settings.keeps_best and module.counters.best_evaluation.get("step") == step:
            self._keep_best(trainer, module)
        self.stopped_by_signal = module.any_rank(self._interrupts.received is not None)
        if self.stopped_by_signal:
            self._asked_to_come_back = module.any_rank(self._interrupts.asks_to_come_back)
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
            self._best_at_checkpoint = module.counters.best_evaluation.get("step")
            self._drop_other_bests(trainer, module)
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

    def _keep_best(self, trainer: L.Trainer, module: RunModule) -> None:
        """The weights as they are, without the optimizer's state; the best before them stays while it is needed."""
        trainer.save_checkpoint(checkpoint_folder(self._folder, self._step, "best"), weights_only=True)
        if module.any_rank(self._checkpoints.failure is not None):
            reason = self._checkpoints.failure
            self._console.warn(f"the best weights, of step {self._step:,}, could not be kept: {reason}")
        else:
            self._drop_other_bests(trainer, module)

    def _drop_other_bests(self, trainer: L.Trainer, module: RunModule) -> None:
        """Leave the best so far, and the best as the last checkpoint knows it: a run may have to go on from there."""
        found = {checkpoint_step(folder): folder for folder in checkpoint_folders(self._folder, "best")}
        best = module.counters.best_evaluation.get("step")
        if trainer.is_global_zero and best in found:  # not where the disk had no room for it
            for step in found.keys() - {best, self._best_at_checkpoint}:
                self._checkpoints.remove_checkpoint(found[step])
