"""DeepSpeed's ZeRO under Lightning: the state, and gradients, of an elementwise rule shared out among the devices."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.strategy import Strategy as LightningStrategy
from torch import nn

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.zero_checks import OTHERWISE, zero_stage
from lowrank_train.memory.zero_shares import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS, PREFETCHED_ELEMENTS
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.update_stats import UpdateStats
from lowrank_train.train.module import RunModule
from lowrank_train.train.sharding import RestoredAsUnderDDP
from lowrank_train.train.zero_shards import ShardOptimizer
from lowrank_train.train.zero_weights import let_go, share_out_, whole_state_dict


class ZeroStrategy(RestoredAsUnderDDP, DeepSpeedStrategy):
    """Lightning's DeepSpeed with our checkpoint folders."""

    engine: ClassVar[Any] = None
    """The last one of this process: a module in parts is of use for as long as it is there."""

    def __init__(self, stage: int, *, rows: int, grad_clip: float | None, **others: Any) -> None:
        """`rows` of a micro-batch, which DeepSpeed wants to know for its own log."""
        whole_for_a_while = {
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": PREFETCHED_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
        settings = {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "overlap_comm": torch.cuda.is_available(),
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
                **(whole_for_a_while if stage == 3 else {}),
            },
            "train_micro_batch_size_per_gpu": rows,
            "gradient_clipping": grad_clip or 0.0,
        }
        super().__init__(config=settings, **others)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        assert isinstance(model, RunModule) and isinstance(optimizer, TransformOptimizer)
        if ZeroStrategy.engine is not None:  # a rehearsal's
            let_go(ZeroStrategy.engine)
        self.shards = model.optimizer = ShardOptimizer.like(optimizer)
        if self.zero_stage_3:
            assert isinstance(self.config, dict)
            share_out_(model, model.model, self.config, self.root_device)
        engine, zero, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[param for param in model.parameters() if param.requires_grad],
            optimizer=self.shards,
            dist_init_required=False,
        )
        ZeroStrategy.engine = engine
        return engine, zero

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole_state_dict(self.lightning_module) if self.zero_stage_3 else self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return self.shards.state_dict()

    def teardown(self) -> None:
        super().teardown()
        if self.zero_stage_3 and self.lightning_module is not None:  # whose parts are still gathered, for samples
            self.lightning_module.to(self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        LightningStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return LightningStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        LightningStrategy.load_model_state_dict(self, checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self.shards.load_state_dict(checkpoint["optimizer_states"][0])


class ZeroPrecision(DeepSpeedPrecision):
    """Weights as they are, and autocast where compute is bf16-mixed, as under the other strategies."""

    def __init__(self, device: torch.device, *, narrow: bool) -> None:
        super().__init__("32-true")
        self._device, self._narrow = device, narrow

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Autocast within DeepSpeed's engine, which turns it off where it is on around its forward pass."""
        if self._narrow:
            module.training_step = torch.autocast(self._device.type, torch.bfloat16)(module.training_step)
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(  # as Lightning's own
        self, tensor: torch.Tensor, model: Any, optimizer: Any, *args: Any, **others: Any
    ) -> None:
        """Lightning has divided the loss by the number of micro-batches already, as it does for everybody."""
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **others)

    def optimizer_step(  # type: ignore[override]  # as Lightning's own
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **others: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, model, closure, **others)
        engine = model.trainer.model
        model.optimizer.stats = update_stats(engine.get_global_grad_norm(), model.optimizer)
        return result


def update_stats(grad_norm: Any, optimizer: TransformOptimizer) -> dict[str, Any]:
    """What an update did, by the norm that ZeRO found before it clipped; it makes none where that is not finite."""
    value = None if grad_norm is None else float(grad_norm)
    skipped = value is not None and not 0 <= value < math.inf  # -1 is what DeepSpeed calls one that is not finite
    return UpdateStats().as_dict() | {
        "grad_norm": None if skipped else value,
        "grad_norm_projected": None if skipped else value,
        "skipped_tensors": len(optimizer.slots) if skipped else 0,
        "skipped_names": [slot.name for slot in optimizer.slots.values()] if skipped else [],
    }


def zero_strategy(config: RunConfig, device: torch.device) -> ZeroStrategy | None:
    """Lightning's strategy, where the run asks for ZeRO. UserError without a GPU."""
    stage = zero_stage(config)
    if stage is None:
        return None
    if device.type == "cpu":
        raise UserError(
            f"trainer.strategy={config.trainer.strategy}: DeepSpeed trains on GPUs only, and there is none here; "
            f"{OTHERWISE}, which work on CPUs too"
        )
    return ZeroStrategy(stage, rows=config.trainer.batch_size, grad_clip=config.optim.grad_clip)
