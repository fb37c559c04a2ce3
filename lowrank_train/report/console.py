"""Everything a run says: to the terminal, and the same lines to log.txt in the run folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from rich.console import Console as RichConsole
from rich.text import Text


class Console:
    """Prints on the first rank only. `rich` is the console that a progress bar draws on; None when not a terminal."""

    def __init__(self, log_path: Path | None, *, silent: bool = False) -> None:
        self.silent = silent
        self.rich = RichConsole(highlight=False) if sys.stdout.isatty() and not silent else None
        self._log_path = None if silent else log_path

    def say(self, text: str) -> None:
        """One or more lines; nothing for no text."""
        if text:
            self.show(Text(text), text)

    def show(self, decorated: object, plain: str) -> None:
        """Something that rich can draw for a terminal, and its plain form for files and pipes."""
        if self.silent:
            return
        if self.rich is not None:
            self.rich.print(decorated, soft_wrap=isinstance(decorated, Text))
        else:
            print(plain, flush=True)
        self.note(plain)

    def warn(self, text: str) -> None:
        """A warning: to the error stream, above the progress bar where there is one."""
        if self.silent:
            return
        line = f"warning: {text}"
        if self.rich is not None:
            self.rich.print(Text(line, style="yellow"), soft_wrap=True)
        else:
            with contextlib.suppress(OSError):  # a stream without room for the warning must not end the run
                print(line, file=sys.stderr, flush=True)
        self.note(line)

    def note(self, text: str) -> None:
        """Only to log.txt; a disk without room takes the note, not the run."""
        if self._log_path is None:
            return
        try:
            with self._log_path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError:
            self._log_path = None
            self.warn("log.txt cannot be written any more")


class WarningsToConsole(logging.Handler):
    """Hands the package's own log records to the console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(record.getMessage())
