"""What each of two processes does with some command lines: it trains them one after the other."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from lowrank_train.cli import main
from lowrank_train.train import run
from lowrank_train.train.machinery import leave_together
from lowrank_train.train.module import RunModule
from tests.train.conftest import without_card

STOPPED, FULL_DISK = "stopped", "full_disk"  # in a run's name: what happens to it
close_window, write_data = RunModule.close_window, HuggingFaceStorageWriter.write_data


def stopped_after_two(module: RunModule) -> Any:
    """A signal to one of the two processes in the middle of the run's second update."""
    if os.environ["LOCAL_RANK"] == "1" and module.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return close_window(module)


def no_room(*_: Any) -> Any:
    """One process cannot write its rows."""
    if os.environ["LOCAL_RANK"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_data(*_)


def trained(words: list[str], what: str | None) -> int:
    """The exit code of a run."""
    window = stopped_after_two if what == STOPPED else close_window
    setattr(RunModule, "close_window", window)  # noqa: B010  (mypy forbids the assignment)
    setattr(HuggingFaceStorageWriter, "write_data", no_room if what == FULL_DISK else write_data)  # noqa: B010
    try:
        return main(words)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def train_all(rank: int, lines: Sequence[tuple[list[str], str | None, int]]) -> None:
    """Words, what happens to the run, and the code with which it is to end."""
    # Lightning has read it where it was imported, before this process had one.
    setattr(rank_zero_only, "rank", rank)  # noqa: B010
    setattr(run, "leave_together", lambda: None)  # noqa: B010  the next run goes on with these processes
    with without_card():
        codes = [trained(words, what) for words, what, _ in lines]
    assert rank > 0 or codes == [code for _, _, code in lines], codes
    leave_together()
