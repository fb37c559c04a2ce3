"""The life of a run on fake tensors: updates of each sort, the strategy's events, an evaluation, a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.config.checks import micro_batches
from lowrank_train.config.schema import RunConfig
from lowrank_train.evaluate.heads import CausalHead, head_of
from lowrank_train.memory.counting import bytes_of, parts_of
from lowrank_train.memory.shares import Shares
from lowrank_train.memory.watch import StorageWatch, Watched, fake_world, make_fake
from lowrank_train.models import meta_model, outputs_of
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.strategy import Strategy

DEVICE = torch.device("cpu")
FIRST, PLAIN, MOVING = "first update", "update", "update that moves bases"


@dataclass
class FakeRun:
    """What was seen of a model with so many layers, and what could not be run."""

    layers: int
    watched: Watched
    remarks: list[str] = field(default_factory=list)
    complete: bool = True  # no phase was left out


def prepared(config: RunConfig, vocab_size: int, layers: int | None = None) -> tuple[PreTrainedModel, Strategy]:
    """The model on meta as the strategy trains it, and the strategy; with another number of layers where given."""
    settings = config.model
    if layers is not None:
        settings = copy.copy(settings)
        settings.num_hidden_layers = layers
    model = meta_model(
        settings, vocab_size=vocab_size, dtype=getattr(torch, config.precision.weights), outputs=outputs_of(config.data)
    )
    state_dtype = getattr(torch, config.precision.state)
    strategy = Strategy.from_config(
        config.strategy,
        state_dtype=state_dtype,
        seed=config.seed,
        rounding=config.precision.rounding,
        int8_group=config.precision.int8_group,
        steps=config.trainer.steps,
    )
    strategy.prepare(model)
    return model, strategy


def optimizer_for(config: RunConfig, strategy: Strategy, model: PreTrainedModel) -> TransformOptimizer:
    """The strategy's optimizer under this run's settings."""
    return strategy.optimizer(
        model,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        grad_clip=config.optim.grad_clip,
        clip_norm_of=config.optim.clip_norm_of,
        micro_batches=micro_batches(config),
        count_lost_updates=config.precision.count_lost_updates,
    )


def fake_run(config: RunConfig, vocab_size: int, layers: int | None = None) -> FakeRun:
    """Live through every phase of a run with fake tensors.

    All is the code of a real run but the loop around it: Lightning wants a trainer, loaders and a device with memory,
    and adds none of its own to that of model, gradients and optimizer. What it does in an update is done here in its
    order, in which the gradients of one update live on until the forward pass of the next is over.
    """
    model, strategy = prepared(config, vocab_size, layers)
    collects = gc.isenabled()
    gc.disable()  # what lies in reference cycles would be freed at moments that differ from run to run
    try:
        with fake_world(on_a_card=config.trainer.accelerator != "cpu") as watch:
            make_fake(model, DEVICE)
            if config.model.activation_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
            run = FakeRun(model.config.get_text_config().num_hidden_layers, watch.seen)
            _Life(config, model, strategy, watch, run).live()
            return run
    finally:
        if collects:
            gc.enable()


def make_bases_due(optimizer: TransformOptimizer) -> bool:
    """Make the next update one that moves every basis; False where there is none that moves."""
    for state in optimizer.state.values():
        if "refresh_at" in state:  # the clock of every subspace
            state["refresh_at"] = 0
    rules = optimizer.transform_of  # the flat shards of ZeRO have none of their own, nor a basis
    return any(rules[param].refresh_due(state) for param, state in optimizer.state.items() if param in rules)


class _Life:
    """The phases, in the order in which a run meets them."""

    def __init__(
        self, config: RunConfig, model: PreTrainedModel, strategy: Strategy, watch: StorageWatch, run: FakeRun
    ) -> None:
        self.config, self.model, self.strategy = config, model, strategy
        self.watch, self.run = watch, run
        self.autocast = config.precision.compute == "bf16-mixed"
        self.micro_batches = min(2, micro_batches(config))  # the third is as the second
        watch.name_parameters(model)
        self.optimizer = optimizer_for(config, strategy, model)
        self.shares = Shares.of(config)
        self._cut_weights()
        self.head = head_of(config)
        self.batch = self._batch()

    def live(self) -> None:
        """Run all phases; one that fake tensors cannot go through is remarked on and left out."""
        watch = self.watch
        watch.mark("before the first update")
        with self._remarked("the updates"):
            self.update(FIRST)
            self.update(PLAIN)
            if make_bases_due(self.optimizer):
                self.update(MOVING)
        for event in self.strategy.events:
            with self._remarked(f"the event {event.name}"):
                watch.begin(f"{event.name} after an update")
                self.strategy.run_events(event.first, self.model, self.optimizer, held_out_loss=self.loss_of_rows)
                watch.name_parameters(self.model)
        if self.strategy.repeat is not None:
            with self._remarked("a repeated update"):
                watch.begin("repeated update")
                self.strategy.repeat.after(self.strategy.repeat.every, self.optimizer, self.loss_of_rows)
        with self._remarked("an evaluation"):
            watch.begin("evaluation")
            self.evaluate()
        with self._remarked("a checkpoint"):
            watch.begin("checkpoint")
            held = (self.model.state_dict(), self.optimizer.state_dict())
            watch.mark("checkpoint")
            del held

    def evaluate(self) -> None:
        """A batch of it; the metrics of a GLUE task need numbers, and a few bytes."""
        if isinstance(self.head, CausalHead):
            self.head.evaluate(self.model, [self.batch], device=DEVICE, autocast=self.autocast)
            return
        self.model.eval()
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.autocast):
            self.head.loss(self.model, self.batch)
        self.model.train()

    def loss_of_rows(self) -> float:
        """A forward pass; fake tensors have no loss, so one number stands for all."""
        self.evaluate()
        return 0.0

    def update(self, phase: str) -> None:
        """One update of all its micro-batches; the last one's passes run inside the optimizer's step."""
        self._cut_state()
        for number in range(self.micro_batches - 1):
            self._passes(phase, number)
        self.optimizer.step(lambda: self._passes(phase, self.micro_batches - 1))
        self.watch.mark(f"{phase}: end")

    def _passes(self, phase: str, number: int) -> None:
        suffix = f" of micro-batch {number + 1}" if self.micro_batches > 1 else ""
        self.watch.begin(f"{phase}: forward{suffix}")
        before = self.watch.bytes_now
        with torch.autocast(DEVICE.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            loss_sum, targets = self.head.loss(self.model, self.batch)
        loss = loss_sum / max(1, targets)
        self.watch.seen.moments[f"{phase}: activations{suffix}"] = self.watch.bytes_now - before
        if number == 0:
            self.optimizer.zero_grad()
        self.watch.begin(f"{phase}: backward{suffix}")
        loss.backward()
        grads = [param.grad for param in self.model.parameters() if param.grad is not None]
        self.watch.seen.moments[f"{phase}: gradients{suffix}"] = sum(map(self.shares.gradient_bytes, grads))
        del loss, loss_sum
        self.watch.begin(f"{phase}: step")

    def _cut_weights(self) -> None:
        """Leave of weights what a device keeps, and of each gradient as soon as it is made."""
        shares, watch = self.shares, self.watch
        for param in self.model.parameters():
            if shares.weights:
                _cut(watch, param, shares.part_bytes(param))
            if shares.gradients and param.requires_grad:
                param.register_post_accumulate_grad_hook(
                    lambda made: None if made.grad is None else _cut(watch, made.grad, shares.part_bytes(made.grad))
                )

    def _cut_state(self) -> None:
        """The same of the state, made before the first update: as it is in the mean of all devices."""
        if not self.shares.state:
            return
        self.optimizer.initialize()
        for param, owner in zip(self.optimizer.slots, self.shares.owners(self.config, self.optimizer), strict=True):
            for key, value in self.optimizer.state_of(param).items():
                if isinstance(value, Tensor):
                    part = value.nbytes // self.shares.ranks
                    if owner is None:
                        part = self.shares.state_part_bytes(self.optimizer, param, key, value)
                    _cut(self.watch, value, part)

    def _batch(self) -> dict[str, Tensor]:
        """A micro-batch of full rows, every position of which is a target: the most that rows of this length hold."""
        shape = (self.config.trainer.batch_size, self.config.data.seq_len)
        batch: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64, device=DEVICE)}
        if outputs_of(self.config.data) is not None:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=DEVICE)
            batch["labels"] = torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
            return batch
        batch["labels"] = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        if self.config.data.packing != "pad" and self.config.data.mask_documents:
            batch["document_ids"] = torch.zeros(shape, dtype=torch.int32, device=DEVICE)
        return batch

    @contextlib.contextmanager
    def _remarked(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, IndexError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.run.complete = False
            self.run.remarks.append(f"{what}: not run on fake tensors, so not in the peak ({first_line})")


def _cut(watch: StorageWatch, tensor: Tensor, size_bytes: int) -> None:
    """Of a tensor that stands for others, each in proportion."""
    whole = bytes_of([tensor])
    for part in parts_of(tensor):
        watch.cut(part, size_bytes * part.nbytes // max(1, whole))
