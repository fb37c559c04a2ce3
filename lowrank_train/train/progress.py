"""How far a run is: a bar on a terminal, a plain line every few updates elsewhere."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lowrank_train.report.console import Console
from lowrank_train.report.units import format_bytes, format_duration


class ProgressDisplay:
    """Shown between `start` and `stop`; `update` is called once an update with its row of metrics.csv."""

    def __init__(self, console: Console, *, steps: int, log_every_steps: int) -> None:
        self._console = console
        self._steps = steps
        self._log_every_steps = log_every_steps
        self._bar: Progress | None = None
        self._first = True

    def start(self, step: int) -> None:
        if self._console.rich is not None:
            self._bar = Progress(
                TextColumn("training"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[facts]}"),
                console=self._console.rich,
                refresh_per_second=4,
                expand=True,
            )
            self._bar.add_task("training", total=self._steps, completed=step, facts="")
            self._bar.start()

    def update(self, row: dict[str, Any], eta_sec: float | None) -> None:
        step = int(row["step"])
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=step, facts=facts_line(row, eta_sec, brief=True))
        due = self._first or step % self._log_every_steps == 0 or step == self._steps
        self._first = False
        if due:
            line = f"step: {step:>{len(str(self._steps))}}/{self._steps}  {facts_line(row, eta_sec, brief=False)}"
            if self._bar is None:
                self._console.say(line)
            else:
                self._console.note(line)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def facts_line(row: dict[str, Any], eta_sec: float | None, *, brief: bool) -> str:
    """The numbers of one update in torchtitan's style; `brief` has room beside a bar."""
    parts = [f"loss: {row['train/loss']:.4f}", f"lr: {row['train/lr']:.2e}"]
    if not brief and isinstance(row.get("train/grad_norm"), float):
        parts.append(f"grad_norm: {row['train/grad_norm']:.4f}")
    parts.append(f"memory: {format_bytes(row['memory/peak_bytes'])}")
    parts.append(f"tps: {row['throughput/tokens_per_sec']:,.0f}")
    if isinstance(row.get("throughput/mfu"), float):
        parts.append(f"mfu: {row['throughput/mfu']:.2%}")
    if not brief and row.get("optim/refreshes"):
        parts.append(f"refreshes: {row['optim/refreshes']} in {row['time/refresh_sec']:.2f} s")
    if eta_sec is not None:
        parts.append(f"eta: {format_duration(eta_sec)}")
    return "  ".join(parts)
