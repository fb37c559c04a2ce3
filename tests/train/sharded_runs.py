"""Run as a program with a file of command lines: each is trained by the two processes that the first one starts."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from lowrank_train.cli import main
from lowrank_train.train import run
from lowrank_train.train.machinery import leave_together
from lowrank_train.train.module import RunModule

STOPPED, FULL_DISK = "stopped", "full_disk"  # in a run's name: what happens to it
RANK = int(os.environ.get("LOCAL_RANK", "0"))


def stopped_after_two(module: RunModule, close_window: Any) -> Any:
    """A signal to one of the two processes in the middle of the run's second update."""
    if RANK == 1 and module.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return close_window(module)


def no_room(*_: Any) -> Any:
    """One process cannot write its rows."""
    if RANK == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_data(*_)


def trained(words: list[str], what: str | None) -> int:
    """The exit code of a run."""
    window = functools.partialmethod(stopped_after_two, close_window) if what == STOPPED else close_window
    setattr(RunModule, "close_window", window)  # noqa: B010  (mypy forbids the assignment)
    setattr(HuggingFaceStorageWriter, "write_data", no_room if what == FULL_DISK else write_data)  # noqa: B010
    try:
        return main(words)
    except SystemExit as leaving:
        return int(leaving.code or 0)


if __name__ == "__main__":
    close_window, write_data = RunModule.close_window, HuggingFaceStorageWriter.write_data
    setattr(run, "leave_together", lambda: None)  # noqa: B010  the next run goes on with these processes
    file = Path(sys.argv[1])
    codes = [trained(words, what) for words, what in json.loads(file.read_text(encoding="utf-8"))]
    file.with_suffix(f".{RANK}").write_text(json.dumps(codes), encoding="utf-8")
    leave_together()
