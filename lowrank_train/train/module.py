"""The Lightning module: loss of an update weighted by tokens, schedule, the data's place, what a checkpoint adds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.config.errors import EXIT_NOT_FINITE, RunStopped
from lowrank_train.config.schema import OptimConfig, RunConfig
from lowrank_train.config.zero_checks import zero_stage
from lowrank_train.evaluate.heads import head_of
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.schedule import multiplier
from lowrank_train.strategy import Strategy
from lowrank_train.train.checkpoint_io import RUN_KEY
from lowrank_train.train.rank_local import join_copies, take_own_copy, take_places
from lowrank_train.train.replicas import ranks_of
from lowrank_train.train.run_state import Counters, random_state

TrainingBatches = Callable[..., Any]
"""(rank, world_size, position) -> the endless micro-batches of that rank from that place on."""


@dataclass
class Window:
    """The micro-batches of one update on this rank."""

    targets: int  # over all ranks
    loss_sum: Tensor  # float64, of this rank so far
    tokens: int = 0
    positions: int = 0


@dataclass(frozen=True)
class Update:
    """What one update saw, over all ranks."""

    loss: float  # nats per target token, as an evaluation on the same tokens would give
    tokens: int
    positions: int
    lr: dict[str, float]  # the rate used, by the group's name


class RunModule(L.LightningModule):
    """Trains `model` with `optimizer`; of the memory strategy behind them it knows the protocol alone."""

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        strategy: Strategy,
        optimizer: TransformOptimizer,
        batches: TrainingBatches,
        *,
        micro_batches: int,
        facts: dict[str, str],
    ) -> None:
        """`facts` are fingerprints that every checkpoint's manifest repeats."""
        super().__init__()
        self.config = config
        self.head = head_of(config)
        self.model = model
        self.strategy = strategy
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        self.facts = facts
        self.counters = Counters()
        self.events: list[str] = []  # what happened after the current update
        self.held_out: list[dict[str, Any]] = []  # validation batches of this rank, for strategies that ask for a loss
        self.began_documents: list[str] = []  # of the current update on this rank; filled only with log_documents
        self.saved_random_state: dict[str, Any] | None = None
        self.last_checkpoint_step: int | None = None
        self.updates_done = 0
        self._batches = batches
        self._position: dict[str, Any] | None = None  # after the last micro-batch that was trained on
        self._saved_positions: list[dict[str, Any]] | None = None  # of every rank
        self._window: Window | None = None
        self._lr_used: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """The processes know each other by now, and no weights are loaded or sent around yet."""
        take_places(self, self.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> Any:
        batches = self._batches(
            rank=self.global_rank, world_size=self.trainer.world_size, position=self._saved_positions
        )
        return batches if self.config.data.repeat else UntilAllEnd(batches, self.micro_batches, self.all_ranks)

    @property
    def sharded(self) -> bool:
        """Whether each rank holds its part of the parameters alone, so that every forward pass needs all of them."""
        return self.device_mesh is not None or zero_stage(self.config) == 3

    def configure_model(self) -> None:
        """The strategy has made the devices known by now; nothing to do where each of them has the whole model."""
        if self.device_mesh is not None:
            from lowrank_train.train.sharding import shard_

            narrow = self.config.precision.compute == "bf16-mixed"
            shard_(self.model, self.device_mesh["data_parallel"], autocast=narrow)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Around sampling, which goes without autocast where each device has the whole model in float32: blocks that
        are gathered in bfloat16 need it."""
        if self.device_mesh is not None and self.config.precision.compute == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def configure_optimizers(self) -> Any:
        """A checkpoint's weights are in place by now, and with them what is trained at this point of the run."""
        self.strategy.regroup(self.model, self.optimizer)
        if not self.sharded:  # who serves shards, the optimizer sees by them
            self.optimizer.ranks = ranks_of(self.config, self.strategy, self)
        return self.optimizer

    def set_rates(self) -> None:
        """Those of the next update: they follow from the configuration and its number, whatever a checkpoint says."""
        factor = lr_factor(self.config.optim, self.config.trainer.steps, self.global_step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * group["lr_ratio"] * factor
            group["weight_decay"] = self.config.optim.weight_decay

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self._window is None:
            self._window = self._open_window(batch)
        window = self._window
        loss_sum, _ = self.head.loss(self.model, batch)
        self._require_finite(loss_sum)
        window.loss_sum += loss_sum.detach().double()
        window.tokens += batch["num_tokens"]
        window.positions += batch["num_positions"]
        self._position = batch["position"]
        self.began_documents += batch.get("documents", [])
        # Lightning divides by the number of micro-batches and DDP averages over ranks. Undoing both leaves the sum
        # over all targets of the update divided by their number, however unevenly they are spread.
        return loss_sum * (self.trainer.accumulate_grad_batches * self.trainer.world_size / window.targets)

    def close_window(self) -> Update:
        """What the update just done saw; the next micro-batch opens a new one."""
        window, self._window = self._window, None
        assert window is not None, "no micro-batch since the last update"
        mine = torch.tensor([window.loss_sum.item(), window.tokens, window.positions], dtype=torch.float64)
        loss_sum, tokens, positions = self.sum_over_ranks(mine).tolist()
        return Update(loss_sum / window.targets, int(tokens), int(positions), self._lr_used)

    def _open_window(self, batch: dict[str, Any]) -> Window:
        targets = self.sum_over_ranks(torch.tensor([batch["window_targets"]], dtype=torch.float64))
        self.set_rates()
        self._lr_used = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return Window(targets=max(1, int(targets.item())), loss_sum=zero)  # 1: a window of nothing but padding

    def _require_finite(self, loss_sum: Tensor) -> None:
        """Stop before a NaN reaches the weights. One synchronisation a micro-batch is the price of stopping in time."""
        broken = torch.tensor([0.0 if math.isfinite(loss_sum.item()) else 1.0], dtype=torch.float64)
        if self.sum_over_ranks(broken).item() == 0:
            return
        rate = ", ".join(f"{value:.3g}" for value in sorted(set(self._lr_used.values())))
        saved = self.last_checkpoint_step
        raise RunStopped(
            f"the training loss became {loss_sum.item()} in update {self.global_step + 1:,} (learning rate {rate}); "
            "the update was not made and nothing saved was overwritten.\n"
            + (f"The last checkpoint is of step {saved:,}.\n" if saved else "There is no checkpoint yet.\n")
            + "Try a lower optim.lr, a longer optim.warmup_steps, optim.grad_clip=1.0, or precision=fp32.",
            EXIT_NOT_FINITE,
        )

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum over processes, on the CPU."""
        if self.trainer.world_size == 1:
            return values
        summed = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed.cpu()

    def all_ranks(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank."""
        return int(self.sum_over_ranks(torch.tensor([float(flag)])).item()) == self.trainer.world_size

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank."""
        return self.sum_over_ranks(torch.tensor([float(flag)])).item() > 0

    def gather_over_ranks(self, value: Any) -> list[Any]:
        """The value of every rank, in their order, on every rank."""
        if self.trainer.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self._window is None, "checkpoints are taken between updates"
        assert self._position is not None, "at least one update precedes a checkpoint"
        checkpoint[RUN_KEY] = {
            "positions": self.gather_over_ranks(self._position),
            "random": self.gather_over_ranks(random_state()),
            "counters": self.counters.as_saved(),
            "facts": self.facts,
            "rank_local": join_copies(checkpoint, self, self.optimizer, self.gather_over_ranks),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint[RUN_KEY]
        take_own_copy(checkpoint, saved.get("rank_local", []), self, self.global_rank, self.trainer.world_size)
        self._saved_positions = saved["positions"]
        self.counters = Counters.from_saved(saved["counters"])
        self.last_checkpoint_step = int(checkpoint["global_step"])
        # An update ends where the count of micro-batches is a multiple of those in one, of which there may be more now.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        shift = self.last_checkpoint_step * self.micro_batches - progress["current"]["ready"]
        for counts in (progress["current"], progress["total"]):
            counts.update({name: count + shift for name, count in counts.items()})
        if len(saved["random"]) == self.trainer.world_size:
            self.saved_random_state = saved["random"][self.global_rank]


class UntilAllEnd:
    """The micro-batches of a corpus that is read once, up to the update for which no rank has a document left."""

    def __init__(self, batches: Any, micro_batches: int, all_ranks: Callable[[bool], bool]) -> None:
        self._batches = batches
        self._micro_batches = micro_batches
        self._all_ranks = all_ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(self._batches):
            if index % self._micro_batches == 0 and self._all_ranks(batch["exhausted"]):
                return
            yield batch


def lr_factor(optim: OptimConfig, steps: int, step: int) -> float:
    """The schedule's multiplier after `step` updates."""
    return multiplier(
        optim.schedule,
        step,
        warmup_steps=optim.warmup_steps,
        steps=steps,
        min_lr_ratio=optim.min_lr_ratio,
        cycle_steps=optim.cycle_steps,
        restart_warmup_steps=optim.restart_warmup_steps,
    )
