"""How was this process started, by srun, by torchrun or alone, and are there as many as trainer.devices says?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig

FIRST_NAMED_STEP = 0xFFFFFFF0  # steps from here on are none of srun's tasks: a batch script, salloc's own shell
SHELLS = ("bash", "interactive")  # names of jobs that are a shell: `srun --pty bash`, and salloc's default


def started_by(env: Mapping[str, str]) -> Literal["torchrun", "srun", "alone"]:
    """Who made this process one of several; torchrun goes first, for srun may have started it.

    A shell inside an allocation (salloc, srun --pty) is no task of srun, and what is typed there is alone.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= FIRST_NAMED_STEP:
        return "alone"
    is_shell = env.get("SLURM_JOB_NAME") in SHELLS or "SLURM_PTY_PORT" in env
    return "alone" if is_shell and env.get("SLURM_STEP_NUM_TASKS", "1") == "1" else "srun"


def is_first_process(env: Mapping[str, str]) -> bool:
    """Whether this is the one that speaks; known before anything heavy is imported."""
    starter = started_by(env)
    if starter == "alone":  # Lightning numbers the processes that it starts itself
        return env.get("LOCAL_RANK", "0") == env.get("NODE_RANK", "0") == "0"
    return env.get("RANK" if starter == "torchrun" else "SLURM_PROCID", "0") == "0"


def check_launch(config: RunConfig, env: Mapping[str, str]) -> None:
    """Raise UserError where the processes that were started do not fit the devices of the configuration."""
    faults = list(launch_faults(config, env))
    if faults:
        raise UserError(faults)


def launch_faults(config: RunConfig, env: Mapping[str, str]) -> Iterator[str]:
    """What would hang, or train one run several times over: processes that do not match the devices."""
    starter = started_by(env)
    if starter == "torchrun":
        yield from _torchrun(config, env)
    elif starter == "srun":
        yield from _srun(config, env)
    elif "SLURM_JOB_ID" in env:
        yield from _without_srun(config, env)


def _torchrun(config: RunConfig, env: Mapping[str, str]) -> Iterator[str]:
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    world, here = int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_WORLD_SIZE", "1"))
    if world != devices * nodes or here != devices:
        yield (
            f"trainer.devices={devices} trainer.num_nodes={nodes}: torchrun has started WORLD_SIZE={world} processes, "
            f"{here} of them on this node, and each is to train on one device; give trainer.devices={here} "
            f"trainer.num_nodes={max(1, world // here)}, or start torchrun --nproc-per-node={devices} --nnodes={nodes}"
        )


def _srun(config: RunConfig, env: Mapping[str, str]) -> Iterator[str]:
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    layout = tasks_per_node(env)
    if len(set(layout)) > 1:
        yield (
            f"SLURM_STEP_TASKS_PER_NODE={env.get('SLURM_STEP_TASKS_PER_NODE')}: the nodes have different numbers of "
            f"tasks, and each is to have trainer.devices={devices}; say --ntasks-per-node={devices} to sbatch or srun, "
            "not --ntasks"
        )
        return
    found = layout[0]
    if found != devices:
        alone = "; all of them would train the same run in the same folder" if devices * nodes == 1 else ""
        given = f"SLURM_NTASKS_PER_NODE={env['SLURM_NTASKS_PER_NODE']}, " if "SLURM_NTASKS_PER_NODE" in env else ""
        yield (
            f"trainer.devices={devices}: srun has started {found} task{'s'[: found != 1]} on each node ({given}"
            f"SLURM_NTASKS={env.get('SLURM_NTASKS', sum(layout))}), and one task trains on one device{alone}; give "
            f"trainer.devices={found}, or --ntasks-per-node={devices} to sbatch or srun"
        )
    if len(layout) != nodes:
        yield (
            f"trainer.num_nodes={nodes}: srun has started tasks on {len(layout)} node{'s'[: len(layout) != 1]} "
            f"(SLURM_NNODES={env.get('SLURM_NNODES', len(layout))}); give trainer.num_nodes={len(layout)}, or "
            f"--nodes={nodes} to sbatch or srun"
        )


def _without_srun(config: RunConfig, env: Mapping[str, str]) -> Iterator[str]:
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    tasks = int(env.get("SLURM_NTASKS", "1"))
    in_a_script = "SLURM_PROCID" in env and "SLURM_STEP_ID" not in env  # in salloc's shell one may train alone
    if tasks > 1 and (in_a_script or devices * nodes > 1):
        yield (
            f"SLURM_NTASKS={tasks}: the allocation is for {tasks} tasks, but this process was started alone, without "
            "srun, and the others never will be; write srun before the command (recipes/slurm/train.sbatch does), or "
            "for a single process ask for --ntasks=1, with --cpus-per-task for more cores"
        )
    elif nodes > 1:
        yield (
            f"trainer.num_nodes={nodes}: nothing starts processes on the other nodes without srun; write srun before "
            f"the command, with --nodes={nodes} --ntasks-per-node={devices}, or give trainer.num_nodes=1"
        )


def tasks_per_node(env: Mapping[str, str]) -> list[int]:
    """The number of tasks on every node of this step: `2(x3),1` is [2, 2, 2, 1]."""
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", layout)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]
