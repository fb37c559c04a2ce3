"""A signal of Slurm lets the update finish, saves, and has the job requeued once; the requeued job goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from lowrank_train.cli import main
from lowrank_train.train.csv_file import MetricsCsv
from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.slurm import StoppedBySignal, came_back, coming_back, leave_name, requeue_signals, requeued
from tests.slurm.conftest import Recorded
from tests.train.conftest import assert_same_run, rows_of

Scontrol = Callable[..., Recorded]
SHOW, REQUEUE = "show job --oneliner 77", "requeue 77"


def stopped(*, asked: bool = True) -> StoppedBySignal:
    return StoppedBySignal(
        "stopped by SIGUSR1 after step 5; all is saved. Run the same command again to go on.",
        128 + signal.SIGUSR1,
        asked_to_come_back=asked,
    )


@pytest.mark.parametrize(
    ("facts", "asked", "refusal"),
    [
        ({}, True, None),
        ({"preempted": "2026-11-22T00:06:17"}, False, None),  # SIGTERM at the beginning of the grace time
        ({"preempted": "2026-11-22T00:06:17", "state": "SIGNALING"}, False, None),
        ({}, False, ""),  # a plain SIGTERM: whoever sent it means it
        ({"state": "COMPLETING"}, False, ""),  # scancel, or past the limit
        ({"state": "COMPLETING"}, True, "it is COMPLETING"),
        ({"requeue": 0}, True, "it was submitted without --requeue"),
        ({"batch": 0}, True, "it is interactive"),
    ],
)
def test_who_is_requeued(scontrol: Scontrol, facts: dict[str, object], asked: bool, refusal: str | None) -> None:
    calls = scontrol(**facts)
    text = str(requeued(stopped(asked=asked)))
    assert calls() == [SHOW, REQUEUE] if refusal is None else calls() == [SHOW]
    if refusal is None:
        assert "Job 77 is requeued and goes on by itself." in text and "same command again" not in text
    elif refusal:
        assert f"Job 77 is not requeued: {refusal}" in text and "same command again" in text
    else:
        assert text == str(stopped())


def test_a_requeue_that_fails_is_said(scontrol: Scontrol) -> None:
    calls = scontrol(code=1)
    assert "is not requeued: scontrol requeue: exit code 1" in str(requeued(stopped()))
    assert calls() == [SHOW, REQUEUE]


def test_without_scontrol_or_without_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert requeued(stopped()).args == stopped().args
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "is not requeued: scontrol show" in str(requeued(stopped()))


def test_submitit_requeues_its_own_jobs(scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = scontrol()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert requeue_signals(os.environ) == (signal.SIGUSR1, signal.SIGUSR2)
    got: list[int] = []

    def submitits(number: int, frame: FrameType | None) -> None:
        got.append(number)

    before = signal.signal(signal.SIGUSR2, submitits)
    try:
        requeued(stopped())
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert got == [signal.SIGUSR2] and calls() == [SHOW]


def test_what_a_signal_does_depends_on_where_the_run_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requeue_signals({}) == ()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    interrupts = Interrupts()
    interrupts.listen()
    try:
        for name in ("SIGUSR1", "SIGTERM"):  # Slurm's order near the limit; the second must not end the saving
            signal.raise_signal(signal.Signals[name])
        assert interrupts.received == signal.SIGUSR1 and interrupts.asks_to_come_back
        assert interrupts.exit_code == 128 + signal.SIGUSR1
    finally:
        interrupts.stop_listening()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize(("name", "calls_made"), [("SIGUSR1", [SHOW, REQUEUE]), ("SIGTERM", [SHOW])])
def test_a_signal_while_the_run_is_built_ends_it_at_once(scontrol: Scontrol, name: str, calls_made: list[str]) -> None:
    calls = scontrol()
    number = signal.Signals[name]
    with pytest.raises(StoppedBySignal, match="outside of the updates") as caught, coming_back(os.environ):
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number and calls() == calls_made


@pytest.fixture
def second_rank(scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """This process is the second of two tasks."""
    calls = scontrol()
    for key, value in {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(key, value)
    return calls


def test_other_ranks_go_on_until_the_first_has_ended_them(second_rank: Recorded) -> None:
    """For it may be waiting for them, where Python has no turn to hear of the signal."""
    reached = False
    with coming_back(os.environ):
        signal.raise_signal(signal.SIGUSR1)
        reached = True
    assert reached
    with pytest.raises(SystemExit) as caught, coming_back(os.environ):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("connection closed by peer")
    assert caught.value.code == 0 and second_rank() == []
    with pytest.raises(RuntimeError, match="of its own"), coming_back(os.environ):
        raise RuntimeError("of its own")


def test_so_do_they_among_updates(second_rank: Recorded) -> None:
    """There the ranks agree where to stop, unless the first one was not yet, or no longer, among them."""
    interrupts = Interrupts()
    with pytest.raises(SystemExit) as caught, coming_back(os.environ):
        interrupts.listen()
        try:
            signal.raise_signal(signal.SIGUSR1)
            raise RuntimeError("connection closed by peer")
        finally:
            interrupts.stop_listening()
    assert caught.value.code == 0 and interrupts.asks_to_come_back
    with pytest.raises(SystemExit) as caught, coming_back(os.environ):
        raise stopped()  # all have saved
    assert caught.value.code == 0 and second_rank() == []


def test_a_folder_knows_the_job_that_came_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_name(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    leave_name(tmp_path)
    assert not came_back(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert came_back(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not came_back(tmp_path)


def test_a_requeued_run_is_the_run_it_would_have_been(
    run: Callable[..., Path],
    tiny: Callable[..., list[str]],
    scontrol: Scontrol,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With resume=false, which is meant for the first start of the job alone."""
    whole = run("whole", "trainer.save_every_steps=0")
    run("asked", "trainer.steps=4", "optim.warmup_steps=1")  # an older run, which resume=false moves aside
    calls = scontrol()
    words = tiny("asked", "trainer.save_every_steps=0", "resume=false")
    with monkeypatch.context() as patch:
        log = MetricsCsv.log_metrics

        def log_and_send(self: MetricsCsv, metrics: dict[str, object], step: int | None = None) -> None:
            log(self, metrics, step)
            if step == 5:
                signal.raise_signal(signal.SIGUSR1)

        patch.setattr(MetricsCsv, "log_metrics", log_and_send)
        assert main(words) == 128 + signal.SIGUSR1
    text = capsys.readouterr().err
    assert "stopped by SIGUSR1 after step 5; everything is saved. Job 77 is requeued" in text
    assert calls() == [SHOW, REQUEUE]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(words) == 0
    assert_same_run(whole, whole.with_name("asked"))
    assert len(rows_of(whole.with_name("asked.1"))) == 4 and not whole.with_name("asked.2").exists()
