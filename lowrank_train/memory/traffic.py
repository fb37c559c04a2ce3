"""What the ranks of a run send each other in an update, counted from the strategy's own rules on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.config.checks import micro_batches, world_size
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.zero_checks import zero_stage
from lowrank_train.memory.shares import owners, units_of
from lowrank_train.memory.wire import Message, added_up
from lowrank_train.memory.zero_shares import stays_whole
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.activity import is_trainable
from lowrank_train.optim.blocks import Blocks
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.transform import State, Transform, counter

WHOLE, SMALL, MOVED = "gradients", "projected gradients", "bases that have moved"


def messages_of(config: RunConfig, model: PreTrainedModel, optimizer: TransformOptimizer) -> list[Message]:
    """Everything of the size of tensors; flags, norms and sums, a few bytes a parameter, are left out.

    `optimizer` is that of the run, with its state made; model and state may be on the meta device.
    """
    if world_size(config) == 1:
        return []
    if zero_stage(config) is not None:
        return added_up(_zero(config, model, zero_stage(config) or 0))
    if config.trainer.strategy == "fsdp":
        return added_up([*_gathered(config, model), *_of_shards(config, optimizer)])
    local = {id(model.get_parameter(f"{path}.{name}"))
             for path, layer in layers_of(model).items() for name in layer.rank_local()}  # fmt: skip
    return added_up(
        message for served in _served(optimizer) if id(served.param) not in local for message in _ddp(config, served)
    )


@dataclass(frozen=True)
class _Served:
    """A parameter with its rule."""

    param: Tensor
    rule: Transform
    state: State

    @property
    def grad_bytes(self) -> int:
        """Gradients have the dtype of their parameter, or that which its codes stand for."""
        return self.param.numel() * self.param.dtype.itemsize

    @property
    def small_bytes(self) -> int:
        """Of the compressed gradient, while the basis rests."""
        at_rest = self.state | {"refresh_at": counter(self.state, "updates_done") + 1}
        low = self.rule.compress(torch.empty(self.param.shape, dtype=self.param.dtype, device="meta"), at_rest)
        return low.numel() * low.element_size()

    @property
    def moved_bytes(self) -> int:
        """Of what a move of the basis changes."""
        values = [self.state[key] for key in self.rule.moved_keys(self.state)]
        return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))

    @property
    def is_projected(self) -> bool:
        return self.rule.compresses and "refresh_at" in self.state

    def moves(self) -> float:
        """How often the basis moves in an update, in the mean of a long run; a lazy one as if it never grew lazy."""
        rule = self.rule.rule if isinstance(self.rule, Blocks) else self.rule
        assert isinstance(rule, InSubspace)
        state, at = dict(self.state), []
        for _ in range(3):  # the first interval may be shorter
            due = max(counter(state, "refresh_at"), counter(state, "updates_done"))
            rule.subspace.schedule_next(state, due, True)
            at.append(counter(state, "refresh_at"))
        return 1 / (at[-1] - at[-2])

    def moves_alone(self) -> bool:
        """Whether one rank moves the basis, later than at the beginning, and tells the others."""
        return self.rule.moves_alone(self.state | {"refreshes": 1})


def _served(optimizer: TransformOptimizer) -> Iterator[_Served]:
    for param in optimizer.slots:
        yield _Served(param, optimizer.transform_of[param], optimizer.state[param])


def _ddp(config: RunConfig, served: _Served) -> Iterator[Message]:
    """As optim/ranks.py and optim/hooks.py send them."""
    if not served.is_projected:
        yield Message(WHOLE, "all_reduce", served.grad_bytes, 1)
        return
    rule, moves, windows = served.rule, served.moves(), micro_batches(config)
    projected = config.trainer.reduce == "projected"
    enough = projected and rule.accumulates and not rule.needs_gradient
    if config.strategy.when == "project_in_backward":
        # Each micro-batch by itself, but for a basis that is to be decided by the whole window.
        held = windows > 1 and config.strategy.basis_under_accumulation == "window"
        whole = moves if enough else (moves if held else moves * windows) + (1 - moves) * windows
        small = (1 - moves if held else 1.0) if projected else 0.0
    else:
        whole, small = (moves, 1 - moves) if enough else (1.0, 0.0)
    yield Message(WHOLE, "all_reduce", served.grad_bytes, whole)
    yield Message(SMALL, "all_reduce", served.small_bytes, small)
    if served.moves_alone():
        yield Message(MOVED, "broadcast", served.moved_bytes, moves)


def _gathered(config: RunConfig, model: PreTrainedModel) -> Iterator[Message]:
    """A block is gathered for each pass, what lies around the blocks stays whole from forward to backward."""
    ranks, windows = world_size(config), micro_batches(config)
    for unit in units_of(config, model):
        weights = unit.weight_bytes(ranks)
        yield Message("weights, for the forward passes", "all_gather", weights, windows)
        if unit.is_block:
            yield Message("weights, for the backward passes", "all_gather", weights, windows)
        yield Message(WHOLE, "reduce_scatter", unit.grad_bytes(ranks), windows)


def _sendings(config: RunConfig, served: _Served) -> float:
    """How often an owner is sent a gradient in an update: each time it is compressed."""
    if config.strategy.when != "project_in_backward" or not served.is_projected:
        return 1
    held = config.strategy.basis_under_accumulation == "window"  # of a window that decides a basis
    windows, moves = micro_batches(config), served.moves() if held else 0.0
    return moves + (1 - moves) * windows


def _of_shards(config: RunConfig, optimizer: TransformOptimizer) -> Iterator[Message]:
    """What updates of matrices cut into rows take, as optim/sharded.py makes them."""
    ranks = world_size(config)
    for served, owner in zip(_served(optimizer), owners(config, optimizer), strict=True):
        weights, gradient = served.grad_bytes / ranks, served.grad_bytes / ranks
        if owner is not None:
            yield Message("gradients, to the owners of matrices", "all_to_all", gradient, _sendings(config, served))
            yield Message("weights, to the owners of matrices and back", "all_to_all", 2 * weights, 1)
        elif served.is_projected:
            moves = served.moves()
            yield Message("gradients, to whom a basis moves by", "all_to_all", gradient, moves)
            yield Message(MOVED, "broadcast", served.moved_bytes, moves)


def _zero(config: RunConfig, model: PreTrainedModel, stage: int) -> Iterator[Message]:
    """ZeRO (arXiv 1910.02054, section 7) as DeepSpeed has it: stage 1 averages once an update, the others each pass.

    Stage 3 gathers for each pass, and after an update what then stays whole.
    """
    trained = sum(param.numel() * param.dtype.itemsize for param in model.parameters() if is_trainable(param))
    windows = micro_batches(config)
    yield Message(WHOLE, "reduce_scatter", trained, 1 if stage == 1 else windows)
    if stage < 3:
        yield Message("weights, after the update", "all_gather", trained, 1)
        return
    sizes = [(param.numel() * param.dtype.itemsize, stays_whole(param)) for param in model.parameters()]
    small, large = (sum(count for count, whole in sizes if whole is kept) for kept in (True, False))
    yield Message("weights, for the forward passes", "all_gather", large, windows)
    yield Message("weights, for the backward passes", "all_gather", large, windows)
    yield Message("small weights, after the update", "all_gather", small, 1)
