"""Trains under ZeRO on processors: Lightning's DeepSpeed wants GPUs, but DeepSpeed itself does not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy

from lowrank_train.config import checks
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.zero_checks import zero_faults, zero_stage
from lowrank_train.train import machinery
from lowrank_train.train.zero import ZeroStrategy
from tests.train.sharded_runs import train_all


class OnCpu(ZeroStrategy):
    """Without the two questions after CUDA, and with buckets that main memory has room for."""

    def __init__(self, stage: int, **others: Any) -> None:
        super().__init__(stage, process_group_backend="gloo", **others)
        assert isinstance(self.config, dict)
        small = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
        if stage == 3:  # so small that a tiny model's parameters are larger
            small |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 2_000}
        self.config["zero_optimization"] |= small

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # memory shared by ranks, by an extension that takes minutes to compile
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def on_cpu(config: RunConfig, device: Any) -> ZeroStrategy | None:
    stage = zero_stage(config)
    rows, clip = config.trainer.batch_size, config.optim.grad_clip
    return None if stage is None else OnCpu(stage, rows=rows, grad_clip=clip)


def train_all_on_cpu(rank: int, lines: Sequence[tuple[list[str], str | None, int]]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    machinery.zero_strategy = on_cpu
    checks.zero_faults = lambda config: (fault for fault in zero_faults(config) if "GPUs only" not in fault)
    train_all(rank, lines)
