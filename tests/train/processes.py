"""Trainings in processes of their own, forked off one that has imported everything: a start takes no seconds."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lowrank_train.cli import main
from tests.train.conftest import without_card
from tests.two_processes import SERVER, on_two


class Started:
    """A training that has been started, whose output is a pipe."""

    def __init__(self, words: Sequence[str]) -> None:
        reader, writer = SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=_train, args=(list(words), writer), daemon=True)
        self._process.start()
        writer.close()
        self._output = io.TextIOWrapper(io.FileIO(os.dup(reader.fileno())), encoding="utf-8")
        reader.close()

    def wait_for(self, text: str, limit_sec: float = 120) -> None:
        """Read lines until one has `text`; fails when the process ends or the time is up."""
        lines, began = [], time.monotonic()
        for line in self._output:
            lines.append(line)
            if text in line:
                return
            assert time.monotonic() - began < limit_sec, "".join(lines)
        raise AssertionError("it ended: " + "".join(lines))

    def signal(self, number: int) -> None:
        """Send a signal to it, unless it has just ended."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def ended(self, limit_sec: float) -> bool:
        """Whether it ends within so many seconds."""
        self._process.join(limit_sec)
        return self._process.exitcode is not None

    def rest(self) -> tuple[int, str]:
        """Its exit code, less than 0 where a signal ended it, and what it has said since it was last waited for."""
        said = self._output.read()
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode, said


def train_on_two(words: Sequence[str], folder: Path) -> str:
    """What the first of two processes says, which torchrun could have started: each trains as `words` say.

    What they print is left in `folder`.
    """
    on_two(_train_as, [*words, "trainer.devices=2", "trainer.strategy=ddp"], folder=folder)
    return (folder / "rank_0.log").read_text(encoding="utf-8")


def _train_as(rank: int, words: list[str]) -> None:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    # Lightning has read it where it was imported, before this process had one; mypy forbids the assignment.
    setattr(rank_zero_only, "rank", rank)  # noqa: B010
    with without_card():
        assert main(words) == 0


def _train(words: list[str], output: Connection) -> None:
    """The process: as `lowrank` is, with both streams into `output`."""
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    sys.exit(main(words))
