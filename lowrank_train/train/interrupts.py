"""Ctrl-C and SIGTERM: the first lets the update finish and be saved, the second stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from lowrank_train.config.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class Interrupts:
    """Remembers the first signal; a second one has its usual effect."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take over both signals. Called after Lightning's own handlers are set, which it puts back at the end."""
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._handle)

    def stop_listening(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def exit_code(self) -> int:
        assert self.received is not None
        return EXIT_CODES[self.received]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
