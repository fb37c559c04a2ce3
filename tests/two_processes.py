"""Two processes that talk to each other, forked off one that has imported what they need: a start takes no seconds."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.slurm.cluster import free_ports

RANKS = 2
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["lowrank_train.train.run", "lowrank_train.report.plots", "hydra", "peft", "torch._dynamo"]
    + ["tests.optim.sharded_ranks", "tests.optim.two_ranks", "tests.train.processes", "tests.train.zero_ranks"]
)


def on_two(program: Callable[..., None], *args: Any, folder: Path, limit_sec: float = 600) -> None:
    """program(rank, *args) on ranks 0 and 1, both of which must come to its end.

    They print into FOLDER/rank_0.log and rank_1.log: a pipe that nobody reads fills up and stops who writes to it.
    """
    logs = [folder / f"rank_{rank}.log" for rank in range(RANKS)]
    [port] = free_ports(1)
    pair = [
        SERVER.Process(target=_placed, args=(rank, port, log, program, args), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in pair:
        process.start()
    ends_sec = time.monotonic() + limit_sec
    while running := [process for process in pair if process.exitcode is None]:
        wait([process.sentinel for process in running], timeout=max(0.0, ends_sec - time.monotonic()))
        if any(process.exitcode for process in pair) or time.monotonic() > ends_sec:  # the other would wait for it
            break
    codes = [process.exitcode for process in pair]
    for process in pair:
        process.kill()
    assert codes == [0] * RANKS, "\n".join([str(codes)] + [log.read_text(encoding="utf-8")[-3000:] for log in logs])


def _placed(rank: int, port: int, log: Path, program: Callable[..., None], args: tuple[Any, ...]) -> None:
    """In the new process: its place, by the names that torch and Lightning read, and its own file to print into."""
    with log.open("w", encoding="utf-8") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in places.items()}
    program(rank, *args)
