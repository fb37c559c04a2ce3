"""The callback that measures every update, evaluates when it is time, and writes the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from lowrank_train.evaluate.heads import CausalHead
from lowrank_train.evaluate.samples import Samples
from lowrank_train.memory.devices import memory_now_bytes, memory_peak_bytes
from lowrank_train.report.console import Console
from lowrank_train.train.csv_file import CsvFile
from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.level import LevelBatches
from lowrank_train.train.module import RunModule, Update
from lowrank_train.train.progress import ProgressDisplay
from lowrank_train.train.rank_local import meet_ranks
from lowrank_train.train.run_state import Stopwatch, restore_random_state

ValidationBatches = Callable[..., Any]
"""(rank, world_size) -> what the head evaluates on that rank: its share of the validation batches, or all rows."""

COLUMNS_BEFORE_RATES = ("step", "tokens", "train/loss", "train/lr")
COLUMNS_AFTER_RATES = (
    "train/grad_norm",  # of the whole gradient before clipping; empty where it cannot be known
    "train/grad_norm_projected",  # of what reaches the update rule
    "throughput/tokens_per_sec",
    "throughput/positions_per_sec",  # padding counted
    "throughput/mfu",
    "memory/now_bytes",
    "memory/peak_bytes",
    "time/refresh_sec",
    "optim/refreshes",  # bases that moved
    "optim/kept_bases",  # bases that were due to move but stayed: the gradient was zero
    "optim/skipped_tensors",
    "optim/lost_updates_pct",  # of bfloat16 weights; empty unless precision.count_lost_updates
    "events",  # what happened after the update: merges, re-decompositions, ...
    "val/loss",
)


def metric_columns(group_names: list[str], of_the_task: Sequence[str] = CausalHead.columns) -> list[str]:
    """The columns of metrics.csv, with one rate for each group of parameters, and what the task's evaluation finds."""
    rates = [f"train/lr_{name}" for name in group_names]
    return [*COLUMNS_BEFORE_RATES, *rates, *COLUMNS_AFTER_RATES, *of_the_task, "time/elapsed_sec"]


class EvaluationInterrupted(Exception):
    """A signal came while evaluating; the evaluation is done anew when the run goes on."""


class Recorder(L.Callback):
    """Runs before the callback that saves, so that a checkpoint never knows less than metrics.csv."""

    def __init__(
        self,
        validation: ValidationBatches,
        interrupts: Interrupts,
        stopwatch: Stopwatch,
        console: Console,
        display: ProgressDisplay,
        loggers: list[Logger],
        *,
        utilization: Callable[[float], float] | None,
        documents: CsvFile | None,
        samples: Samples | None = None,
    ) -> None:
        """`utilization` turns positions per second into MFU, where the accelerator is known; `documents` is
        documents.csv, where it is wanted; `samples` are answers to prompts of the validation data."""
        self._validation = validation
        self._interrupts = interrupts
        self._stopwatch = stopwatch
        self._console = console
        self._display = display
        self._loggers = loggers
        self._utilization = utilization
        self._documents = documents
        self._samples = samples
        self._validation_rows: Any = ()
        self._step = 0
        self._elapsed_before_sec = 0.0
        self._evaluation_sec = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Weights and counters are restored by now; finish the evaluation that an interruption left undone."""
        module = as_ours(pl_module)
        counters = module.counters
        self._elapsed_before_sec = counters.elapsed_sec
        counters.sessions += 1
        self._stopwatch.begin_session()
        # Opened once, now: files that are not there end the run here, and rows once tokenized are kept.
        self._validation_rows = self._validation(rank=module.global_rank, world_size=trainer.world_size)
        if module.sharded and isinstance(module.head, CausalHead):  # GLUE's rows are all evaluated by all ranks
            self._validation_rows = LevelBatches(self._validation_rows, module.gather_over_ranks)
        if module.strategy.repeat is not None:
            module.held_out = module.head.few(self._validation_rows, module.strategy.repeat.rows, trainer.world_size)
        if counters.pending_row:
            row, counters.pending_row = counters.pending_row, {}
            self._evaluate_into(row, trainer, module)
            self._write(row)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = as_ours(pl_module)
        self._step = trainer.global_step
        self._interrupts.listen()
        self._display.start(self._step)
        if module.saved_random_state is not None:
            restore_random_state(module.saved_random_state)
        self._stopwatch.begin_session()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # a micro-batch in the middle of an update
            return
        self._step = trainer.global_step
        module = as_ours(pl_module)
        module.updates_done = self._step
        row = self._measure(module.close_window(), module)
        self._note_documents(module)
        settings = module.config.trainer
        last = is_last_update(trainer, settings.steps)
        module.counters.data_ended = last and self._step < settings.steps
        self._display.update(row, self._eta_sec(settings.steps, settings.eval_every_steps))
        if last or (settings.eval_every_steps and self._step % settings.eval_every_steps == 0):
            try:
                self._evaluate_into(row, trainer, module)
            except EvaluationInterrupted:
                module.counters.pending_row = row
                return
        self._write(row)
        self._stopwatch.leave_out_until_now()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._display.stop()
        self._interrupts.stop_listening()

    def _measure(self, update: Update, module: RunModule) -> dict[str, Any]:
        """The row of one update, and the counters with it."""
        seconds = self._stopwatch.end_lap()
        counters, stats = module.counters, module.optimizer.stats
        counters.tokens += update.tokens
        counters.positions += update.positions
        counters.refreshes += stats["refreshes"]
        counters.refresh_sec += stats["refresh_sec"]
        counters.skipped_tensors += stats["skipped_tensors"]
        counters.peak_memory_bytes = max(counters.peak_memory_bytes, memory_peak_bytes(module.device))
        counters.elapsed_sec = self._elapsed()
        if self._stopwatch.laps > 1:  # the first of a session warms up: allocation, compilation, caches
            counters.measured_tokens += update.tokens
            counters.measured_positions += update.positions
            counters.measured_sec += seconds
        if stats["skipped_tensors"]:
            self._console.warn(
                f"step {self._step}: the gradients of {stats['skipped_tensors']} tensors were not finite; "
                "those tensors were left as they are"
            )
        positions_per_sec = update.positions / seconds
        return {
            "step": self._step,
            "tokens": counters.tokens,
            "train/loss": update.loss,
            "train/lr": next(iter(update.lr.values())),
            **{f"train/lr_{name}": rate for name, rate in update.lr.items()},
            "train/grad_norm": blank_if_none(stats["grad_norm"]),
            "train/grad_norm_projected": blank_if_none(stats["grad_norm_projected"]),
            "throughput/tokens_per_sec": update.tokens / seconds,
            "throughput/positions_per_sec": positions_per_sec,
            "throughput/mfu": "" if self._utilization is None else self._utilization(positions_per_sec),
            "memory/now_bytes": memory_now_bytes(module.device),
            "memory/peak_bytes": counters.peak_memory_bytes,
            "time/refresh_sec": stats["refresh_sec"],
            "optim/refreshes": stats["refreshes"],
            "optim/kept_bases": stats["kept_bases"],
            "optim/skipped_tensors": stats["skipped_tensors"],
            "optim/lost_updates_pct": blank_if_none(stats["lost_updates_pct"]),
            "events": "; ".join(module.events),
            "time/elapsed_sec": counters.elapsed_sec,
        }

    def _note_documents(self, module: RunModule) -> None:
        if self._documents is None and not module.config.data.log_documents:
            return
        began, module.began_documents = module.gather_over_ranks(module.began_documents), []
        module.counters.documents += sum(len(names) for names in began)
        if self._documents is not None:
            for rank, names in enumerate(began):
                for name in names:
                    self._documents.write({"step": self._step, "rank": rank, "document": name})

    def _evaluate_into(self, row: dict[str, Any], trainer: L.Trainer, module: RunModule) -> None:
        watch = Stopwatch()
        found = self._evaluate(trainer, module)
        self._evaluation_sec = watch.end_lap()
        module.counters.evaluation = {"step": row["step"], **found}
        score, best = module.head.score(found), module.counters.best_evaluation
        if not best or score > best["score"]:
            module.counters.best_evaluation = {"score": score, "step": row["step"], **found}
        row |= module.head.row(found)
        self._console.say(f"step: {row['step']}  {module.head.sentence(found, self._evaluation_sec)}")
        if self._samples is not None:
            with module.computing():
                told = self._samples.take(module.model, row["step"], write=trainer.is_global_zero)
            self._console.say("\n".join(told))

    def _evaluate(self, trainer: L.Trainer, module: RunModule) -> dict[str, Any]:
        alone = trainer.world_size == 1
        meet_ranks(module.model)
        return module.head.evaluate(
            module.model,
            self._validation_rows,
            device=module.device,
            autocast=module.config.precision.compute == "bf16-mixed",
            sum_over_ranks=module.sum_over_ranks,
            between_batches=self._raise_if_interrupted if alone else None,  # ranks may have unequal numbers of them
        )

    def _raise_if_interrupted(self) -> None:
        if self._interrupts.received is not None:
            raise EvaluationInterrupted

    def _write(self, row: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.log_metrics(row, step=row["step"])

    def _elapsed(self) -> float:
        return self._elapsed_before_sec + self._stopwatch.session_sec()

    def _eta_sec(self, steps: int, eval_every_steps: int) -> float | None:
        """Seconds to the end at the pace of this session, the evaluations still to come included."""
        pace_sec = self._stopwatch.mean_lap_sec()
        if pace_sec is None:
            return None
        evaluations = steps // eval_every_steps - self._step // eval_every_steps if eval_every_steps else 1
        return (steps - self._step) * pace_sec + evaluations * self._evaluation_sec


def as_ours(module: L.LightningModule) -> RunModule:
    """The module's own type, which Lightning's hooks do not know."""
    assert isinstance(module, RunModule)
    return module


def is_last_update(trainer: L.Trainer, steps: int) -> bool:
    """Whether the run ends here: all updates made, or no data left (Lightning looks one batch ahead)."""
    return trainer.global_step >= steps or trainer.is_last_batch


def blank_if_none(value: float | torch.Tensor | None) -> float | str:
    """A number for the table, or the empty string for what is not known."""
    return "" if value is None else float(value)
