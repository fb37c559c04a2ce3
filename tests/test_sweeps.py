"""Sweeps end with one comparison; a grid of learning rates comes from a recipe; no two jobs share a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_train import cli
from lowrank_train.config import RunConfig, compose, sweeps
from lowrank_train.config.sweep_jobs import Job, recorded_jobs, run_folders
from lowrank_train.report import compare

Compared = list[tuple[list[Path], Path]]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunConfig]:
    """The jobs that a sweep starts, instead of running them; each leaves its folder."""
    seen: list[RunConfig] = []

    def run(words: list[str]) -> int:
        seen.append(compose(words))
        assert seen[-1].run_name is not None
        (Path(seen[-1].output_dir) / seen[-1].run_name).mkdir(parents=True)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "run_apart", run)
    return seen


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """What is handed over for comparison."""
    seen: Compared = []
    monkeypatch.setattr(compare, "compare_sweep", lambda folders, out: seen.append((folders, out)))
    return seen


def test_a_grid_of_learning_rates_for_each_strategy(jobs: list[RunConfig], compared: Compared, tmp_path: Path) -> None:
    assert cli.main(["-m", "recipe=lr_grid", "strategy=full,galore", "output_dir=mine"]) == 0
    tried = {(config.strategy.name, config.optim.lr) for config in jobs}
    assert tried == {(name, lr) for name in ("full", "galore") for lr in (1e-3, 3e-3, 1e-2)}
    [(folders, out)] = compared
    assert len(set(folders)) == len(jobs) == 6
    assert all(folder.is_dir() and folder.parent == Path("mine") for folder in folders)
    assert out.parent == Path("runs/sweeps") and (tmp_path / out / "multirun.yaml").is_file()


def test_rates_on_the_command_line_take_the_place_of_the_grid(jobs: list[RunConfig], compared: Compared) -> None:
    assert cli.main(["-m", "recipe=lr_grid", "optim.lr=0.2,0.5"]) == 0
    assert [config.optim.lr for config in jobs] == [0.2, 0.5]
    assert len(compared) == 1


def test_a_grid_is_checked_before_it_starts(
    jobs: list[RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps, "grid_of", lambda recipe: {"optim.lr": "1e-3,fast", "optim.lrr": "1"})
    assert cli.main(["-m", "recipe=lr_grid"]) == 2
    errors = capsys.readouterr().err
    assert "optim.lr=fast" in errors and "Did you mean optim.lr?" in errors and not jobs


def test_values_that_differ_in_signs_alone_have_folders_of_their_own(jobs: list[RunConfig], compared: Compared) -> None:
    assert cli.main(["-m", "generate.prompt='a b','a/b'", "seed=1"]) == 0
    names = [config.run_name for config in jobs]
    assert len(set(names)) == 2 and names[1] == f"{names[0]}.2"


def test_other_verbs_and_jobs_that_never_began_are_not_compared(
    jobs: list[RunConfig], compared: Compared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "run_apart", lambda words: 0)
    assert cli.main(["explain", "-m", "strategy=full,galore"]) == 0
    assert compared == []
    monkeypatch.undo()
    capsys.readouterr()
    compare.compare_sweep([Path("nowhere")], Path("out"))
    assert capsys.readouterr().out == "" and not Path("out").exists()


def test_a_key_given_and_swept_is_part_of_the_names(jobs: list[RunConfig], compared: Compared) -> None:
    assert cli.main(["-m", "seed=7", "seed=1,2", "hydra.sweep.dir=mine"]) == 0
    assert [(config.run_name or "").rpartition("-")[2] for config in jobs] == ["seed=1", "seed=2"]
    assert [out for _, out in compared] == [Path("mine")]
    assert cli.main(["-m", "seed=3,4", "hydra.sweep.dir=mine"]) == 0  # the jobs of before are forgotten
    assert [run.name.rpartition("-")[2] for run in run_folders(Path("mine"))] == ["seed=3", "seed=4"]


def test_a_sweep_folder_stands_for_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Job(str(tmp_path / "a"), 0).record(tmp_path / "sweep", 1)
    Job(None, 3).record(tmp_path / "sweep", 0)
    assert recorded_jobs(tmp_path / "sweep") == [Job(None, 3), Job(str(tmp_path / "a"), 0)]
    seen: list[Path] = []
    monkeypatch.setattr(compare, "readable", lambda paths: (seen.extend(paths), ([], ["nothing"]))[1])
    assert cli.main(["compare", str(tmp_path / "sweep"), str(tmp_path / "b")]) == 2
    assert seen == [tmp_path / "a", tmp_path / "b"]


def test_a_launcher_is_for_sweeps_and_has_to_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launcher=slurm"]) == 2
    assert cli.main(["-m", "launcher=slrm", "seed=1,2"]) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["-m", "launcher=slurm", "seed=1,2"]) == 2
    monkeypatch.setattr(sweeps.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["-m", "launcher=slurm", "seed=1,2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert ["add -m" in said[0], "Did you mean slurm?" in said[1], "no sbatch and no srun" in said[2]] == [True] * 3
    assert "pip install -e '.[slurm]'" in said[3]


SBATCH = """#!/bin/sh
cp "$1" {folder}/submitted.sh
for task in 0 1; do
    SLURM_JOB_ID=10$task SLURM_ARRAY_JOB_ID=100 SLURM_ARRAY_TASK_ID=$task SLURM_PROCID=0 \\
        sh "$1" > {folder}/output$task.txt 2>&1 &
done
echo Submitted batch job 100
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
    case "$1" in --output|--error) shift ;; esac
    shift
done
exec "$@"
"""


def test_slurm_gets_an_array_of_jobs_that_may_be_requeued(tmp_path: Path, project_root: Path) -> None:
    """A recorded sbatch, which runs the two jobs at once; they are quick ones, and one of them fails."""
    pytest.importorskip("submitit")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in (
        ("sbatch", SBATCH.format(folder=tmp_path)),
        ("srun", SRUN),
        ("sacct", "#!/bin/sh\nexit 1\n"),
    ):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    words = ["doctor", "quick=true", "-m", "launcher=slurm", "hydra.launcher.partition=low", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [sys.executable, project_root / "train.py", *words, f"output_dir={tmp_path}/runs,/proc/nowhere"],
        cwd=tmp_path, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, check=False,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert [job.exit_code for job in recorded_jobs(tmp_path / "sweep")] == [0, 1]
    submitted = (tmp_path / "submitted.sh").read_text()
    for option in (
        "--array=0-1%2", "--requeue", "--signal=USR2@300", "--partition=low", "--job-name=lowrank", "--nodes=1",
        "--ntasks-per-node=1", "--gpus-per-node=1", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {option}\n" in submitted, option
    assert "export OMP_WAIT_POLICY=passive" in submitted
