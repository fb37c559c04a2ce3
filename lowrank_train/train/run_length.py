"""Calling a run off after its first update when it is going to be long, so that it is rehearsed before it goes on."""

from __future__ import annotations

import time

from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.module import RunModule
from lowrank_train.train.phases import Cue

LONG_RUN_SEC = 3600.0  # rehearse=auto: a run beyond it is worth a rehearsal


class RunIsLong(Exception):
    """Raised after the first update, before anything is recorded."""


def called_off_if_long(steps: int, interrupts: Interrupts) -> Cue:
    """For the first place among the callbacks: RunIsLong where updates like the first would take beyond an hour.

    The first is the slowest (memory is allocated, kernels are compiled, bases are computed): no long run goes on
    unrehearsed, and whether it is long, the rehearsal judges by its own second update.
    """
    began_sec = 0.0

    def start(module: RunModule, step: int) -> None:
        nonlocal began_sec
        began_sec = time.perf_counter()

    def judge(module: RunModule, step: int) -> None:
        if step != 1:
            return
        long = module.any_rank((time.perf_counter() - began_sec) * steps > LONG_RUN_SEC)
        if long and not module.any_rank(interrupts.received is not None):  # who asked to stop wants no rehearsal
            raise RunIsLong

    return Cue(judge, start)
