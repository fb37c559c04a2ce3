"""Processes that do not match the devices are refused at once, with the numbers and the way out; all others start."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lowrank_train.cli import main
from lowrank_train.config.launch import is_first_process, launch_faults, started_by, tasks_per_node
from lowrank_train.config.schema import RunConfig, TrainerConfig

BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lowrank", "SLURM_PROCID": "0"}  # the script that sbatch was given
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive"}


def srun(per_node: str, nodes: int = 1, **more: str) -> dict[str, str]:
    """The environment of a task, as Slurm 22.05 makes it."""
    tasks = sum(tasks_per_node({"SLURM_STEP_TASKS_PER_NODE": per_node}))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_STEP_NUM_TASKS": str(tasks)}
    return {**BATCH, **step, "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes), **more}


def torchrun(world: int, here: int) -> dict[str, str]:
    """The environment of a worker, inside a task of srun."""
    return {
        **srun("1", world // here), "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(here), "RANK": "0",
    }  # fmt: skip


def faults(env: Mapping[str, str], devices: int, nodes: int = 1) -> list[str]:
    return list(launch_faults(RunConfig(trainer=TrainerConfig(devices=devices, num_nodes=nodes)), env))


@pytest.mark.parametrize(
    ("env", "devices", "nodes"),
    [
        ({}, 1, 1),
        ({}, 4, 1),
        (srun("1"), 1, 1),
        (srun("8"), 8, 1),
        (srun("8(x16)", 16), 8, 16),
        (srun("1", SLURM_NTASKS_PER_NODE="4"), 1, 1),  # a step of one task in a larger job
        ({**BATCH, "SLURM_NTASKS": "1"}, 1, 1),
        ({**BATCH, "SLURM_NTASKS": "1"}, 4, 1),  # Lightning starts the others
        (SALLOC, 1, 1),
        ({**SALLOC, "SLURM_NTASKS": "4"}, 1, 1),  # python typed in its shell, on one device
        (srun("1", SLURM_JOB_NAME="bash"), 2, 1),  # srun --pty bash
        (
            {**SALLOC, "SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            1,
            1,
        ),  # salloc's own step
        (torchrun(8, 8), 8, 1),
        (torchrun(16, 8), 8, 2),
    ],
)
def test_what_fits_starts(env: dict[str, str], devices: int, nodes: int) -> None:
    assert faults(env, devices, nodes) == []


@pytest.mark.parametrize(
    ("env", "devices", "nodes", "words"),
    [
        ({**BATCH, "SLURM_NTASKS": "2"}, 2, 1, ["SLURM_NTASKS=2", "write srun before", "--ntasks=1"]),
        ({**BATCH, "SLURM_NTASKS": "4"}, 1, 1, ["SLURM_NTASKS=4", "--cpus-per-task"]),
        ({**SALLOC, "SLURM_NTASKS": "4"}, 4, 1, ["SLURM_NTASKS=4", "write srun before"]),
        ({**BATCH, "SLURM_NTASKS": "1"}, 1, 2, ["trainer.num_nodes=2", "--nodes=2 --ntasks-per-node=1"]),
        (
            srun("2", SLURM_NTASKS_PER_NODE="2"), 1, 1,
            ["trainer.devices=1", "2 tasks", "SLURM_NTASKS_PER_NODE=2", "the same run in the same folder",
             "give trainer.devices=2"],
        ),
        (srun("2"), 4, 1, ["2 tasks on each node", "trainer.devices=2", "--ntasks-per-node=4"]),
        (srun("8(x2)", 2), 8, 1, ["trainer.num_nodes=1", "2 nodes", "SLURM_NNODES=2", "give trainer.num_nodes=2"]),
        (srun("8"), 8, 2, ["trainer.num_nodes=2", "1 node ", "--nodes=2"]),
        (srun("4(x2),3", 3), 4, 3, ["SLURM_STEP_TASKS_PER_NODE=4(x2),3", "--ntasks-per-node=4"]),
        (torchrun(8, 8), 1, 1, ["WORLD_SIZE=8", "trainer.devices=8 trainer.num_nodes=1", "--nproc-per-node=1"]),
        (torchrun(16, 8), 16, 1, ["WORLD_SIZE=16", "trainer.devices=8 trainer.num_nodes=2"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(env: dict[str, str], devices: int, nodes: int, words: list[str]) -> None:
    [fault] = faults(env, devices, nodes)
    assert [word for word in words if word not in fault] == []


def test_both_numbers_may_be_wrong_at_once() -> None:
    assert len(faults(srun("8(x2)", 2), 1, 1)) == 2


def test_the_command_line_refuses_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in srun("2").items():
        monkeypatch.setenv(name, value)
    assert main(["trainer.devices=1"]) == 2
    assert "all of them would train the same run in the same folder" in capsys.readouterr().err
    assert main(["--cfg", "job"]) == 0  # what does not train may be asked anywhere


def test_who_speaks() -> None:
    assert started_by(srun("2")) == "srun" and started_by(torchrun(2, 2)) == "torchrun" and started_by({}) == "alone"
    assert is_first_process(srun("2")) and not is_first_process({**srun("2"), "SLURM_PROCID": "1"})
    assert not is_first_process({**torchrun(2, 2), "RANK": "1"})
    assert is_first_process({**BATCH, "SLURM_PROCID": "0"}) and not is_first_process({"LOCAL_RANK": "1"})
