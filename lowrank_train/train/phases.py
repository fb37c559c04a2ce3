"""The phases of a rehearsal: their places in a run, a line for each, and the name of the one that failed."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from lowrank_train.checkpoint import is_disk_full
from lowrank_train.config.errors import EXIT_DISK_FULL, EXIT_FAILURE, EXIT_OUT_OF_MEMORY, RunStopped, UserError
from lowrank_train.memory.devices import forget_memory_peak, memory_peak_bytes
from lowrank_train.memory.out_of_memory import is_out_of_memory
from lowrank_train.report.banner import phase_line
from lowrank_train.report.console import Console
from lowrank_train.train.module import RunModule
from lowrank_train.train.recorder import as_ours

Act = Callable[[RunModule, int], None]
"""(module, number of the update just made) -> what is done at one place among the callbacks."""


class Phases:
    """One phase after the other, with its seconds and the most memory in use meanwhile."""

    def __init__(self, console: Console, device: torch.device) -> None:
        self._console = console
        self._device = device
        self._began_sec = 0.0
        self.name = "the beginning"

    def begin(self, name: str) -> None:
        """What was going on is over, said or not."""
        self._wait()
        forget_memory_peak(self._device)
        self.name, self._began_sec = name, time.perf_counter()

    def end(self, note: str = "") -> float:
        """Print the line of the phase; its seconds."""
        self._wait()
        seconds = time.perf_counter() - self._began_sec
        self._console.say(phase_line(self.name, seconds, memory_peak_bytes(self._device), note))
        return seconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextlib.contextmanager
    def named_in_failures(self) -> Iterator[None]:
        """UserError and RunStopped for whatever is raised, with the phase and the exit code of the fault."""
        try:
            yield
        except UserError as error:
            raise UserError([f"rehearsal, {self.name}: {fault}" for fault in error.faults]) from None
        except RunStopped as error:
            raise self._stopped(str(error), error.exit_code) from None
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if is_out_of_memory(error):
                raise self._stopped(f"out of memory: {reason}", EXIT_OUT_OF_MEMORY) from None
            if isinstance(error, OSError) and is_disk_full(error):
                raise self._stopped(f"the disk is full: {reason}", EXIT_DISK_FULL) from None
            self._console.note(traceback.format_exc())
            text = f"{type(error).__name__}: {reason}\nThe traceback is in log.txt of the run folder."
            raise self._stopped(text, EXIT_FAILURE) from error

    def _stopped(self, text: str, code: int) -> RunStopped:
        way_out = "\nrehearse=false trains without a rehearsal, up to where it fails." if code == EXIT_FAILURE else ""
        return RunStopped(f"rehearsal, {self.name}: {text}{way_out}", code)


class Cue(L.Callback):
    """A place among the callbacks: `act` once an update; before the first, `start` with the number of those made."""

    def __init__(self, act: Act | None, start: Act | None = None) -> None:
        self._act, self._start = act, start
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        if self._start is not None:
            self._start(as_ours(pl_module), self._step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._act is not None and trainer.global_step != self._step:  # else a micro-batch in the middle of an update
            self._step = trainer.global_step
            self._act(as_ours(pl_module), self._step)


class LastRow(Logger):
    """Keeps the newest row of metrics.csv."""

    def __init__(self) -> None:
        super().__init__()
        self.row: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        return "rehearsal"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.row = metrics

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are those of the run."""


def stop_together(module: RunModule, fault: str, code: int) -> None:
    """RunStopped on every rank as soon as one of them has a fault."""
    if module.any_rank(bool(fault)):
        raise RunStopped(fault or "another device has stopped", code)
