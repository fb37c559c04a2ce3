"""Slurm's words for a test: an environment without a job, and a scontrol that writes down what it is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.train.conftest import corpus, run, tiny  # noqa: F401  (fixtures)

Recorded = Callable[[], list[str]]

JOB = "JobId=77 JobName=lowrank JobState={state} Requeue={requeue} Restarts=0 BatchFlag={batch} PreemptTime={preempted}"

SCONTROL = """#!/bin/sh
echo "$*" >> {calls}
case "$1" in
show) cat {facts} ;;
requeue) [ {code} != 0 ] || kill -TERM $PPID; exit {code} ;; # the signal by which Slurm ends what it requeues
esac
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever job the tests themselves run in."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Recorded]]:
    """Put a scontrol on the path that knows of job 77, in which this process then is; gives what it was told."""

    def install(
        *, state: str = "RUNNING", requeue: int = 1, batch: int = 1, preempted: str = "None", code: int = 0
    ) -> Recorded:
        folder = tmp_path / "bin"
        folder.mkdir()
        calls, facts = folder / "calls.txt", folder / "facts.txt"
        facts.write_text(JOB.format(state=state, requeue=requeue, batch=batch, preempted=preempted) + "\n")
        tool = folder / "scontrol"
        tool.write_text(SCONTROL.format(calls=calls, facts=facts, code=code))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    before = signal.getsignal(signal.SIGTERM)
    yield install
    signal.signal(signal.SIGTERM, before)  # which a process that has been requeued no longer hears
