"""The rehearsal: every phase of a run once, on its real configuration, so that what would fail in days fails now."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank_train.checkpoint import PARTIAL_SUFFIX, checkpoint_folder
from lowrank_train.config.errors import EXIT_DISK_FULL, EXIT_FAILURE
from lowrank_train.config.files import save
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer, validation_batches
from lowrank_train.evaluate.loading import open_trained
from lowrank_train.export import compare, write_hugging_face
from lowrank_train.memory.devices import forget_memory_peak, free_unused
from lowrank_train.memory.fake_run import make_bases_due
from lowrank_train.report.console import Console
from lowrank_train.report.units import format_duration
from lowrank_train.train import run_length
from lowrank_train.train.checkpoint_io import FolderCheckpoints
from lowrank_train.train.events import EventRunner, run_events
from lowrank_train.train.fingerprints import Fingerprints, differing, fingerprints, listed
from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.machinery import build_trainer, explained_failures, is_first_rank
from lowrank_train.train.module import RunModule
from lowrank_train.train.phases import Act, Cue, LastRow, Phases, stop_together
from lowrank_train.train.progress import ProgressDisplay
from lowrank_train.train.recorder import Recorder
from lowrank_train.train.room import lacking_for_export, room_for_checkpoints
from lowrank_train.train.run_folder import CHECKPOINTS, CONFIG_FILE
from lowrank_train.train.run_state import Stopwatch
from lowrank_train.train.saver import Saver
from lowrank_train.train.summary import sampled_paragraph

EVALUATED_BATCHES = 4  # full ones, on each device
SAME_LOSS = 1e-3  # relative, of two forward passes with the same weights on a GPU, which may round sums differently
FIRST, SECOND, SAVED, COMPARED, AFTER_EVENTS = 1, 2, 3, 4, 5  # numbers of updates
FOLDER = "rehearsal" + PARTIAL_SUFFIX  # beside the checkpoints: on their disk, and swept away as an unfinished one is

Build = Callable[[RunConfig], RunModule]


def rehearse(
    config: RunConfig, console: Console, run_folder: Path, build: Build, tokenizer: Tokenizer, device: torch.device
) -> None:
    """Live through every phase with objects that `build` makes and that are gone afterwards.

    UserError or RunStopped where one fails. The caller puts the random generators back and starts from step 0.
    """
    stage = run_folder / CHECKPOINTS / FOLDER
    free_unused(device)  # of a run that was called off
    try:
        _Rehearsal(config, console, stage, build, tokenizer, device).run()
    finally:
        if is_first_rank():
            shutil.rmtree(stage, ignore_errors=True)
        free_unused(device)
        forget_memory_peak(device)


class _Rehearsal:
    """Two lives: the first saves and goes on for an update; the second, of new objects, begins at what was saved."""

    def __init__(
        self, config: RunConfig, console: Console, stage: Path, build: Build, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        # None of these moves the numbers of training.
        settings = dataclasses.replace(config.trainer, eval_every_steps=SAVED, save_every_steps=SAVED)
        self.config = dataclasses.replace(config, trainer=settings, run=str(stage))
        self.console, self.stage, self.build, self.tokenizer, self.device = console, stage, build, tokenizer, device
        self.steps = settings.steps
        self.phases = Phases(console, device)
        self.checkpoints, self.last = FolderCheckpoints(), LastRow()
        self.pace_sec = 0.0
        self.moving = self.short = False
        self.happened: list[str] = []
        self.saved: Fingerprints = {}  # of the first objects when they were saved, and an update later
        self.expected: Fingerprints = {}
        self.expected_loss = math.nan

    def run(self) -> None:
        self.console.say("rehearsal of every phase; training then starts at step 0 (rehearse=false leaves it out):")
        if self.steps < AFTER_EVENTS:
            self.console.say(f"  left out: a run of {self.steps} updates is its own")
            return
        began_sec = time.perf_counter()
        with self.phases.named_in_failures():
            updates = self.first_life()
            if self.short or updates < COMPARED:
                why = self.length() if self.short else f"the data end after {updates} updates"
                self.console.say(f"  {why}: the rest is left out")
                return
            free_unused(self.device)
            self.second_life()
            free_unused(self.device)
            if is_first_rank():
                self.phases.begin("export")
                self.phases.end(self.exported())
        self.console.say(f"  rehearsed in {time.perf_counter() - began_sec:.1f} s; {self.length()}")

    def length(self) -> str:
        """How long the run is going to be, and whence that is known."""
        whole = format_duration(self.pace_sec * self.steps)
        return f"{self.steps:,} updates at the pace of the second, {self.pace_sec:.3g} s, take {whole}"

    def first_life(self) -> int:
        """Updates, an evaluation, a save, and one update more; the number of updates."""
        self.phases.begin("first update")
        module = self.build(self.config)
        self.fit(module, self.first_updated, self.first_recorded, self.first_saved)
        return module.updates_done

    def first_updated(self, module: RunModule, step: int) -> None:
        if step == FIRST:
            self.phases.end(f"{module.micro_batches} x {self.config.trainer.batch_size} rows a device")
        elif step == SECOND:
            self.pace_sec = self.phases.end()
        elif step == SAVED:
            self.phases.end(f"{module.optimizer.stats['refreshes']} moved" if self.moving else "")
            self.phases.begin("evaluation")

    def first_recorded(self, module: RunModule, step: int) -> None:
        found = module.counters.evaluation
        if step == SAVED and found:  # else a signal came
            self.phases.end(f"loss {found['loss']:.4f} on {found['num_targets']:,} tokens")
            self.phases.begin("save")

    def first_saved(self, module: RunModule, step: int) -> None:
        if step == FIRST:
            self.phases.begin("second update")
        elif step == SECOND:
            long = module.any_rank(self.pace_sec * self.steps > run_length.LONG_RUN_SEC)
            self.short = self.config.rehearse == "auto" and not long
            self.moving = make_bases_due(module.optimizer)
            self.phases.begin("update, bases move" if self.moving else "third update")
        elif step == SAVED:
            self.phases.end(self.room(module))
            self.saved = fingerprints(module)
        elif step == COMPARED:
            self.expected, self.expected_loss = fingerprints(module), self.last.row["train/loss"]
        if self.short or step == COMPARED:
            module.trainer.should_stop = True

    def second_life(self) -> None:
        """New objects from the checkpoint: the same bits, also an update later; then what the run meets later on."""
        self.phases.begin("kill and resume")
        module = self.build(self.config)
        self.fit(module, self.second_updated, None, self.second_saved, self.second_loaded)
        if is_first_rank() or module.sharded:  # all ranks, where each forward pass needs them
            self.phases.begin("sample")
            with explained_failures(self.config, module), module.computing():
                model = module.model if module.sharded else module.model.to(self.device)
                text = sampled_paragraph(self.config, model, self.tokenizer)
            self.phases.end(f"{len(text)} characters")

    def second_loaded(self, module: RunModule, step: int) -> None:
        different = differing(self.saved, fingerprints(module))
        stop_together(module, f"loaded otherwise than saved: {listed(different)}" if different else "", EXIT_FAILURE)

    def second_updated(self, module: RunModule, step: int) -> None:
        if step == AFTER_EVENTS:
            self.phases.end(", ".join(dict.fromkeys(self.happened)))

    def second_saved(self, module: RunModule, step: int) -> None:
        if step == COMPARED:
            self.phases.end(self.compared(module))
            later = sorted({event.first for event in module.strategy.events if step < event.first <= self.steps})
            if later:  # as if their time had come
                self.phases.begin("events, an update")
                self.happened = [event.name for first in later for event in run_events(module, first)]
        if step == AFTER_EVENTS or not self.happened:
            module.trainer.should_stop = True

    def compared(self, module: RunModule) -> str:
        """The update after the checkpoint, made by the second objects, against that of the first."""
        different, loss = differing(self.expected, fingerprints(module)), self.last.row["train/loss"]
        if self.device.type == "cuda" and math.isclose(loss, self.expected_loss, rel_tol=SAME_LOSS) and different:
            # Kernels there may add in the order in which their threads arrive, with or without an interruption.
            return (
                f"the same bits; an update later {len(different)} of {len(self.expected)} tensors differ, as GPUs add"
            )
        fault = f"the next update differs: loss {loss}, not {self.expected_loss}; {listed(different)}"
        stop_together(module, fault if different else "", EXIT_FAILURE)
        return "the same bits, also an update later"

    def exported(self) -> str:
        """What came of the checkpoint as a plain folder, written and compared as `lowrank export` does it."""
        lacking = lacking_for_export(self.config, self.tokenizer, self.stage)
        if lacking:
            return f"left out: {lacking}"
        save(self.config, self.stage / CONFIG_FILE)
        trained, folder = open_trained(self.config), self.stage / "export"
        folder.mkdir()
        write_hugging_face(self.config, trained, folder)
        difference, positions = compare(self.config, trained, folder)
        return f"reloaded; logits at {positions:,} positions differ by at most {difference:.1e}"

    def room(self, module: RunModule) -> str:
        """What was written, and RunStopped where the disk cannot hold what the run keeps and one being written."""
        failure = self.checkpoints.failure
        stop_together(module, f"the disk is full: {failure}" if failure is not None else "", EXIT_DISK_FULL)
        if not is_first_rank():
            stop_together(module, "", EXIT_DISK_FULL)
            return ""
        saved = checkpoint_folder(self.stage / CHECKPOINTS, SAVED)
        fault, fact = room_for_checkpoints(saved, self.config.trainer.keep_checkpoints)
        stop_together(module, fault, EXIT_DISK_FULL)
        return fact

    def fit(self, module: RunModule, updated: Act, recorded: Act | None, saved: Act, loaded: Act | None = None) -> None:
        """Train as the run does but silently, each act at its place; with `loaded`, from the checkpoint on."""
        interrupts, stopwatch, quiet = Interrupts(), Stopwatch(), Console(None, silent=True)
        display = ProgressDisplay(quiet, steps=self.steps, log_every_steps=self.steps)
        recorder = Recorder(
            self.few_validation_batches(), interrupts, stopwatch, quiet, display, [self.last],
            utilization=None, documents=None,
        )  # fmt: skip
        saver = Saver(self.stage / CHECKPOINTS, self.checkpoints, interrupts, stopwatch, quiet)
        trainer = build_trainer(
            self.config,
            self.device,
            folder=self.stage,
            micro_batches=module.micro_batches,
            callbacks=[EventRunner(quiet), Cue(updated), recorder, Cue(recorded), saver, Cue(saved, loaded)],
            loggers=[],
            checkpoints=self.checkpoints,
        )
        checkpoint = None if loaded is None else checkpoint_folder(self.stage / CHECKPOINTS, SAVED)
        with explained_failures(self.config, module):
            trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        if saver.stopped_by_signal:
            raise saver.stopped("; nothing was trained or saved yet")

    def few_validation_batches(self) -> Callable[..., Any]:
        """(rank, world_size) -> this rank's share of the first rows."""
        data, settings = self.config.data, self.config.trainer
        tokens = EVALUATED_BATCHES * settings.batch_size * data.seq_len * settings.devices * settings.num_nodes
        few = dataclasses.replace(data, validation_tokens=min(tokens, data.validation_tokens or tokens))
        return functools.partial(validation_batches, few, self.tokenizer, batch_size=settings.batch_size)
