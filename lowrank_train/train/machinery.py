"""Lightning set up for our needs: quiet, without its own checkpoints, bars and clipping; and failures in words."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lowrank_train.config.errors import EXIT_OUT_OF_MEMORY, RunStopped, UserError
from lowrank_train.config.fsdp_checks import sharded
from lowrank_train.config.launch import started_by
from lowrank_train.config.schema import RunConfig, TrainerConfig
from lowrank_train.evaluate.loading import quiet_transformers
from lowrank_train.memory.out_of_memory import is_out_of_memory, obituary, phase_of
from lowrank_train.report.console import Console, WarningsToConsole
from lowrank_train.train.checkpoint_io import FolderCheckpoints
from lowrank_train.train.module import RunModule
from lowrank_train.train.replicas import Replicas
from lowrank_train.train.zero import ZeroPrecision, zero_strategy

# Warnings of Lightning and torch about what is so on purpose, or is not the user's to change.
NOT_FOR_THE_USER = (
    r".*does not have many workers.*",  # rows are made in the training process unless data.num_workers says otherwise
    r".*CheckpointIO.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*GPU available but not used.*",
    r".*The `srun` command is available on your system but is not used.*",
    r".*Found \d+ module\(s\) in eval mode.*",
    r".*Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",  # wrong where step() has a closure
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our data resumes by itself
    r".*`LightningModule.configure_optimizers`.*",
    r".*`torch.distributed.\w+` is deprecated.*",  # which DeepSpeed calls
)


def is_first_rank() -> bool:
    """Whether this process writes and speaks; right before any process group exists."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def local_rank() -> int:
    """The number of this process on its machine, as torchrun, Lightning or Slurm give it."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def quiet_libraries(console: Console) -> None:
    """Leave only what concerns the user: our own warnings on the console, others' errors."""
    quiet_transformers()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in NOT_FOR_THE_USER:
        warnings.filterwarnings("ignore", message=pattern)
    ours = logging.getLogger("lowrank_train")
    for handler in list(ours.handlers):  # of an earlier run in this process
        ours.removeHandler(handler)
    ours.addHandler(WarningsToConsole(console))


def micro_batches_of(trainer: TrainerConfig) -> int:
    """Micro-batches in an update. UserError when the total is not a multiple."""
    rows = trainer.batch_size * trainer.devices * trainer.num_nodes
    total = trainer.total_batch_size or rows
    if total % rows:
        raise UserError(
            f"trainer.total_batch_size is {total}, but must be a multiple of {rows} = {trainer.batch_size} "
            f"(trainer.batch_size) x {trainer.devices * trainer.num_nodes} devices"
        )
    return total // rows


def build_trainer(
    config: RunConfig,
    device: torch.device,
    *,
    folder: Path,
    micro_batches: int,
    callbacks: list[L.Callback],
    loggers: list[Logger],
    checkpoints: FolderCheckpoints,
) -> L.Trainer:
    """A Lightning trainer that counts updates and leaves evaluation, saving and clipping to us."""
    settings = config.trainer
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices is {settings.devices}, but this machine has {torch.cuda.device_count()} GPUs; "
            "set trainer.devices to at most that"
        )
    plugins: list[object] = [checkpoints, *cluster_environment(settings)]
    alone = settings.devices * settings.num_nodes == 1
    narrow = config.precision.compute == "bf16-mixed"
    zero = zero_strategy(config, device)
    if zero is not None:
        plugins.append(ZeroPrecision(device, narrow=narrow))
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        # Buffers (supports, masks, counters) are the same on every rank by construction; DDP would send them all before
        # every forward pass.
        strategy=zero or ("auto" if alone else sharding_of(config, device) or Replicas(broadcast_buffers=False)),
        # The model already has the dtype of precision.weights. Lightning's "bf16-true" would cast once more, and with
        # it the rotary frequencies, which must stay float32.
        precision=None if zero is not None else "bf16-mixed" if narrow else "32-true",
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,  # type: ignore[arg-type]
        default_root_dir=folder,
    )


def sharding_of(config: RunConfig, device: torch.device) -> Strategy | None:
    """Lightning's strategy for parameters in shards, where the run asks for it."""
    if not sharded(config):
        return None
    from lowrank_train.train.sharding import ShardedStrategy  # FSDP2 takes a second to import

    devices = config.trainer.devices * config.trainer.num_nodes
    return ShardedStrategy(devices, backend="gloo" if device.type == "cpu" else None)


def cluster_environment(settings: TrainerConfig) -> list[object]:
    """What tells Lightning of the other processes, where it would guess wrong: under Slurm."""
    starter = started_by(os.environ)
    if starter == "srun":
        # Of the job, not of this step of it, and absent where tasks were given by --ntasks alone. What srun has really
        # started fits: config/launch.py has seen to it.
        os.environ["SLURM_NTASKS_PER_NODE"] = str(settings.devices)
        # Lightning's own requeueing saves wherever Python happens to be, also in the middle of an update.
        return [SLURMEnvironment(auto_requeue=False)]
    if starter == "alone" and "SLURM_JOB_ID" in os.environ:
        return [LightningEnvironment()]  # Lightning takes every process in an allocation for one of srun's tasks
    return []


def leave_together() -> None:
    """At a run's end, on all ranks: wait for the others, then end the process group.

    Left to the interpreter's exit, gloo's threads now and then abort a process whose work is done (pytorch issue
    190489), and Lightning then kills the first rank too, which may still be writing its results. Not for a rank that
    failed alone: the others wait for it in the backward pass, not here.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def explained_failures(config: RunConfig, module: RunModule | None = None) -> Iterator[None]:
    """Out of memory as a RunStopped with remedies; Lightning's exit after Ctrl-C as the KeyboardInterrupt it was.

    `module`: None while it is not built yet.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunStopped(out_of_memory_text(config, module, error), EXIT_OUT_OF_MEMORY) from None
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def out_of_memory_text(config: RunConfig, module: RunModule | None, error: BaseException) -> str:
    """What happened in which phase, what is saved, what was held, and what needs less, planned for this run."""
    first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
    phase = f"out of memory ({phase_of(error)}"
    if module is None:
        return f"{phase}): {first_line}\n{obituary(config, None, None)}"
    saved = module.last_checkpoint_step
    kept = f"The last checkpoint is of step {saved:,}; it is kept." if saved else "There is no checkpoint yet."
    held = obituary(config, module.model, module.optimizer)
    return f"{phase}, after {module.updates_done:,} updates): {first_line}\n{kept}\n{held}"
