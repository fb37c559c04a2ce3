"""A Slurm of one node: the sbatch file as it is shipped, preempted and signalled in mid-run, trains the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.train.conftest import assert_same_run, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}")]

SBATCH_FILE = "recipes/slurm/train.sbatch"
TWO_TASKS = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Controller, node and their credentials, for the tests of this file."""
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def submit(cluster: Cluster, project_root: Path, tmp_path: Path, tiny: Callable[..., list[str]]) -> Callable[..., str]:
    """Submit the shipped file for a run of two CPU tasks that lasts some seconds."""

    def call(name: str) -> str:
        words = tiny(
            name, "trainer.steps=80", "trainer.total_batch_size=32", "trainer.eval_every_steps=25",
            "trainer.save_every_steps=0",
        )  # fmt: skip
        output = f"--output={tmp_path}/{name}.txt"
        return cluster.submit(*TWO_TASKS, output, SBATCH_FILE, *words, cwd=project_root)

    return call


def wait_until(condition: Callable[[], bool], what: str, limit_sec: float = 400) -> None:
    """Fails with `what` did not happen."""
    ends_sec = time.monotonic() + limit_sec
    while not condition():
        assert time.monotonic() < ends_sec, what
        time.sleep(0.1)


def updates(folder: Path) -> int:
    """How many updates metrics.csv has by now."""
    return len(rows_of(folder)) if (folder / "metrics.csv").exists() else 0


def test_preempted_and_signalled_it_is_the_run_it_would_have_been(
    cluster: Cluster, submit: Callable[..., str], tmp_path: Path, project_root: Path
) -> None:
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    output = tmp_path / "asked.txt"
    uninterrupted, job = submit("whole"), submit("asked")
    cluster.wait(uninterrupted, "JobState=COMPLETED")

    # Preempted as soon as it has begun: SIGTERM, and a minute of grace that it does not need.
    wait_until((asked / "checkpoints").exists, "the run began")
    other = cluster.submit("--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1", cwd=project_root)
    cluster.wait(other, "JobState=COMPLETED")
    cluster.wait(job, "Restarts=1")

    # Warned in the middle of training, as --signal does it before the limit.
    before = updates(asked)
    wait_until(lambda: updates(asked) >= before + 20, "the requeued run trains")
    cluster.signal(job, "USR1")
    cluster.wait(job, "Restarts=2")
    facts = cluster.wait(job, "JobState=COMPLETED")
    said = output.read_text()

    assert "ExitCode=0:0" in facts and "Restarts=2" in facts
    assert "stopped by SIGTERM" in said and "stopped by SIGUSR1 after step" in said
    assert said.count(f"Job {job} is requeued and goes on by itself.") == 2
    assert_same_run(whole, asked)
    assert len(rows_of(asked)) == 80


def test_launches_that_do_not_fit_end_at_once(cluster: Cluster, tmp_path: Path, project_root: Path) -> None:
    """The variables that Slurm really sets, in a script and in a task."""
    output = tmp_path / "wrong.txt"
    python = f"{project_root}/.venv/bin/python" if (project_root / ".venv").exists() else "python3"
    alone, several = f"{python} train.py trainer.devices=2", f"srun {python} train.py trainer.devices=1"
    script = f"{alone}; echo alone $?; {several}; echo srun $?"
    job = cluster.submit("--ntasks-per-node=2", f"--output={output}", f"--wrap={script}", cwd=project_root)
    cluster.wait(job, "JobState=COMPLETED")
    said = output.read_text()
    assert "alone 2" in said and "SLURM_NTASKS=2: the allocation is for 2 tasks" in said
    assert "srun 2" in said and "all of them would train the same run in the same folder" in said
