"""Ctrl-C, SIGTERM and the signals of Slurm: the first lets the update finish and be saved, a second Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from lowrank_train.train.slurm import Remembered, requeue_signals

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Remembers the first signal during updates; a second one has its usual effect.

    In a Slurm job that goes for Ctrl-C alone: Slurm sends a warning, then SIGTERM, then SIGKILL, and what is being
    saved after the first shall be saved before the last.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._requeue_signals = requeue_signals(os.environ)
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take over all signals. Called after Lightning's own handlers are set, which it puts back at the end."""
        for number in (*STOP_SIGNALS, *self._requeue_signals):
            self._previous[number] = signal.signal(number, self._handle)

    def stop_listening(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def asks_to_come_back(self) -> bool:
        """Whether the signal was one after which the job is to be requeued."""
        return self.received in self._requeue_signals

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it."""
        assert self.received is not None
        return 128 + self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._previous.get(signal.Signals(number))
        if isinstance(before, Remembered):  # who is about to lose the first rank, updates or not
            before(number, frame)
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT or not self._requeue_signals:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
