"""The Slurm job that a run lives in: which signals ask it to save and come back, and who then requeues it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from lowrank_train.config.errors import RunStopped
from lowrank_train.config.launch import is_first_process

SCONTROL_LIMIT_SEC = 60
ALIVE = ("RUNNING", "SIGNALING")  # a job that was cancelled, or is past its limit, is COMPLETING
JOB_FILE = "slurm_job.txt"  # in the run folder: the job that trains there
AGAIN = "Run the same command again to go on."


class StoppedBySignal(RunStopped):
    """A run that a signal ended, after everything was saved that there was to save."""

    def __init__(self, reason: str, exit_code: int, *, asked_to_come_back: bool) -> None:
        """`asked_to_come_back`: by Slurm's warning signal, on whichever rank."""
        super().__init__(reason, exit_code)
        self.asked_to_come_back = asked_to_come_back


def requeue_signals(env: Mapping[str, str]) -> tuple[signal.Signals, ...]:
    """Those after which a Slurm job is to be requeued: SIGUSR1, and submitit's where it has started the job."""
    if "SLURM_JOB_ID" not in env:
        return ()
    of_submitit = submitit_signal(env)
    return (signal.SIGUSR1,) if of_submitit in (None, signal.SIGUSR1) else (signal.SIGUSR1, of_submitit)


def submitit_signal(env: Mapping[str, str]) -> signal.Signals | None:
    """The signal for which submitit, in a job of its own, has a handler that requeues; None in other jobs."""
    if env.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    return signal.Signals["SIG" + env.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]


class Remembered:
    """For the ranks that the first one ends: whether a signal came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True


@contextlib.contextmanager
def coming_back(env: Mapping[str, str]) -> Iterator[None]:
    """Around all that a run does: ends it on a signal also outside of its updates, and has the job requeued last.

    There the first rank alone is ended by the signal, as soon as it does not wait for another one; the end of its
    process is that of the job. Would the others leave, it might wait for them in vain, deaf to every signal.
    """
    remembered = Remembered()
    try:
        with taking_signals(stop_at_once if is_first_process(env) else remembered):
            yield
    except StoppedBySignal as stopped:
        if is_first_process(env):
            raise requeued(stopped) from None
        # The first rank says why. srun --kill-on-bad-exit would take any other code for a crash, and kill it meanwhile.
        raise SystemExit(0 if "SLURM_JOB_ID" in env else stopped.exit_code) from None
    except Exception:
        if remembered.came:  # the first rank is gone, and said why
            raise SystemExit(0) from None
        raise


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """For where no update is under way."""
    raise StoppedBySignal(
        f"stopped by {signal.Signals(number).name} outside of the updates: nothing is lost. {AGAIN}",
        128 + number,
        asked_to_come_back=number in requeue_signals(os.environ),
    )


@contextlib.contextmanager
def taking_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """In a Slurm job: its signals and SIGTERM go to `handler`."""
    signals = requeue_signals(os.environ)
    previous = {number: signal.signal(number, handler) for number in (signals and (*signals, signal.SIGTERM))}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def requeued(stopped: StoppedBySignal) -> StoppedBySignal:
    """Have the job requeued where that is meant, as the last act of the first rank; the same end, with what came of it.

    After SIGTERM the job comes back only where Slurm is preempting it: whoever cancels a job means it. Under submitit
    its own handler requeues, so that there is never a second one, and this does not return.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return stopped
    facts, refusal = job_facts(job)
    preempted = facts.get("PreemptTime", "None") != "None"
    if not stopped.asked_to_come_back and not preempted:
        return stopped
    if facts and facts.get("JobState") not in ALIVE:
        refusal = f"it is {facts.get('JobState')}"
    elif facts and facts.get("BatchFlag") != "1":
        refusal = "it is interactive"
    elif facts and facts.get("Requeue") != "1":
        refusal = "it was submitted without --requeue"
    number = submitit_signal(os.environ)
    if not refusal and number is None:
        # Slurm ends a job that it requeues at once, by the signal that this process has answered already: what came of
        # it is still to be said.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        refusal = scontrol("requeue", job)[1]
    elif not refusal and number is not None:
        if callable(signal.getsignal(number)):  # ours is no longer there, and submitit's is
            signal.raise_signal(number)
        refusal = "that is for submitit to do, which started it"
    reason = (
        f"{stopped}\nJob {job} is not requeued: {refusal}."
        if refusal
        else f"{str(stopped).removesuffix(AGAIN)}Job {job} is requeued and goes on by itself."
    )
    return StoppedBySignal(reason, stopped.exit_code, asked_to_come_back=stopped.asked_to_come_back)


def job_facts(job: str) -> tuple[dict[str, str], str]:
    """What `scontrol show job` says, and why it says nothing where it does not."""
    answer, refusal = scontrol("show", "job", "--oneliner", job)
    facts: dict[str, str] = {}
    for key, value in re.findall(r"(\w+)=(\S*)", answer):
        facts.setdefault(key, value)  # the command of the job stands near the end and may hold anything
    return facts, refusal


def scontrol(*words: str) -> tuple[str, str]:
    """The output of scontrol, and why it failed; the latter is empty where it did not."""
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=SCONTROL_LIMIT_SEC, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"scontrol {words[0]}: {error}"
    failure = f"scontrol {words[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}" if done.returncode else ""
    return done.stdout, failure


def came_back(run_folder: Path) -> bool:
    """Whether this is a job that Slurm has requeued and that trained in this folder before."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    file = run_folder / JOB_FILE
    return file.is_file() and file.read_text(encoding="utf-8").strip() == job


def leave_name(run_folder: Path) -> None:
    """Write down which job trains here."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        (run_folder / JOB_FILE).write_text(f"{job}\n", encoding="utf-8")
