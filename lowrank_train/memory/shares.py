"""What one device keeps where weights, gradients or state are shared out, and what it holds whole for a while."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.config.checks import world_size
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.zero_checks import zero_stage
from lowrank_train.memory.counting import bytes_of, weights_by_kind
from lowrank_train.memory.zero_shares import beside_parts
from lowrank_train.models import around_blocks, blocks_of
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.activity import is_trainable
from lowrank_train.optim.exact_optimizer import bytes_by_kind
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.owners import owner_of_each
from lowrank_train.optim.transform import State

MASTER = "float32 copies of the weights"


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together, and how: a block of layers, or what lies around the blocks."""

    params: tuple[nn.Parameter, ...]
    is_block: bool
    narrow: bool  # gathered in bfloat16, averaged in float32

    def weight_bytes(self, ranks: int) -> int:
        """All ranks' shares together, whose last rows are padding where they do not go up."""
        return sum(_padded(p, ranks) * (2 if self.narrow else _item_bytes(p)) for p in self.params)

    def grad_bytes(self, ranks: int) -> int:
        """The same of the gradients."""
        trained = [p for p in self.params if is_trainable(p)]
        return sum(_padded(p, ranks) * (4 if self.narrow else p.dtype.itemsize) for p in trained)


def units_of(config: RunConfig, model: nn.Module) -> list[Unit]:
    """As train/sharding.py cuts a model up."""
    blocks = blocks_of(model)
    autocast = config.precision.compute == "bf16-mixed"
    around = around_blocks(model)
    outside = set(around)
    units = [
        Unit(tuple(p for p in block.parameters() if p not in outside), True, autocast and not layers_of(block))
        for block in blocks
    ]
    return [*units, Unit(tuple(around), False, False)]


def _item_bytes(param: Tensor) -> int:
    """Of a number, as it is stored; scales of codes are left out."""
    return bytes_of([param]) // max(1, param.numel())


def _padded(param: Tensor, ranks: int) -> int:
    rows = param.shape[0] if param.ndim else 1
    return math.ceil(rows / ranks) * ranks * (param.numel() // max(1, rows))


def owners(config: RunConfig, optimizer: TransformOptimizer) -> list[int | None]:
    """Of each parameter that the optimizer serves, the rank that keeps its state; None where all keep their rows."""
    parts = [(param, slot, optimizer.transform_of[param]) for param, slot in optimizer.slots.items()]
    return owner_of_each(parts, world_size(config), config.precision.rounding)


@dataclass(frozen=True)
class Shares:
    """What of a run is cut into a part for each device. Without any, one device keeps all."""

    ranks: int
    weights: bool = False
    gradients: bool = False
    state: bool = False
    by_rows: bool = False  # FSDP2: parameters by rows, and matrices whose rule wants them whole by owners
    masters: bool = False  # ZeRO, where weights stay whole: the rule works on float32 copies of its part

    @classmethod
    def of(cls, config: RunConfig) -> Shares:
        """As `trainer` says."""
        ranks, stage = world_size(config), zero_stage(config)
        if ranks == 1 or (stage is None and config.trainer.strategy != "fsdp"):
            return cls(ranks)
        if stage is None:
            return cls(ranks, weights=True, gradients=True, state=True, by_rows=True)
        return cls(ranks, weights=stage == 3, gradients=stage >= 2, state=True, masters=stage < 3)

    def part_bytes(self, param: Tensor) -> int:
        """Of a tensor that is cut up, on the device that has most."""
        return self.part_of(param) * bytes_of([param]) // max(1, param.numel())

    def part_of(self, param: Tensor) -> int:
        """The numbers of it."""
        if self.by_rows and param.ndim:
            return math.ceil(param.shape[0] / self.ranks) * (param.numel() // max(1, param.shape[0]))
        return math.ceil(param.numel() / self.ranks)

    def gradient_bytes(self, grad: Tensor) -> int:
        """Of a gradient, between passes."""
        return self.part_bytes(grad) if self.gradients else grad.nbytes

    def kept(self, config: RunConfig, model: PreTrainedModel, optimizer: TransformOptimizer) -> dict[str, int]:
        """By kind what the fullest device keeps between two updates; the optimizer's state is made, if only on meta."""
        found = weights_by_kind(model)
        if self.weights:
            for param in dict.fromkeys(model.parameters()):
                kind = "trained_weights" if is_trainable(param) else "frozen_weights"
                found[kind] += self.part_bytes(param) - bytes_of([param])
        return found | {f"state.{kind}": count for kind, count in self._state(config, optimizer).items()}

    def _state(self, config: RunConfig, optimizer: TransformOptimizer) -> dict[str, int]:
        if not self.state:
            return optimizer.state_bytes()
        everywhere: dict[str, int] = {}
        of_owner: dict[int, dict[str, int]] = {}
        for param, owner in zip(optimizer.slots, self.owners(config, optimizer), strict=True):
            into = everywhere if owner is None else of_owner.setdefault(owner, {})
            for kind, count in self._kinds(optimizer, param, owner is None).items():
                into[kind] = into.get(kind, 0) + count
        fullest = max(of_owner.values(), key=lambda kinds: sum(kinds.values()), default={})
        for kind, count in fullest.items():
            everywhere[kind] = everywhere.get(kind, 0) + count
        if self.masters:
            everywhere[MASTER] = sum(4 * self.part_of(param) for param in optimizer.slots)
        shared = optimizer.state_bytes().get("shared", 0)
        return everywhere | ({"shared": shared} if shared else {})

    def owners(self, config: RunConfig, optimizer: TransformOptimizer) -> list[int | None]:
        """As `owners`; None for all where flat parts of everything are kept."""
        return owners(config, optimizer) if self.by_rows else [None] * len(optimizer.slots)

    def _kinds(self, optimizer: TransformOptimizer, param: Tensor, cut: bool) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, value in optimizer.state_of(param).items():
            if isinstance(value, Tensor):
                (kind,) = bytes_by_kind([{key: value}])
                count = self.state_part_bytes(optimizer, param, key, value) if cut else value.nbytes
                found[kind] = found.get(kind, 0) + count
        return found

    def state_part_bytes(self, optimizer: TransformOptimizer, param: Tensor, key: str, value: Tensor) -> int:
        """Of a state tensor that is cut as its parameter is; the basis of a subspace is the same everywhere."""
        state: State = optimizer.state.get(param, {})
        if key in optimizer.transform_of[param].moved_keys(state):
            return value.nbytes
        return self.part_bytes(value)


def for_a_while(config: RunConfig, model: PreTrainedModel, optimizer: TransformOptimizer, phase: str) -> int:
    """Bytes that a device holds whole in a phase beside its parts: FSDP2's two blocks of layers, the one that computes
    and the one that comes next, and what lies around the blocks; in backward two blocks' gradients, the one that is
    being made and the one on its way, unless a matrix is there with its owner; in a step the gradient and twice the
    weights of the largest matrix of an owner. Of ZeRO as `beside_parts` says.
    """
    shares = Shares.of(config)
    if not shares.by_rows:
        return beside_parts(shares, model, optimizer, phase)
    units, ranks = units_of(config, model), shares.ranks
    blocks = [unit for unit in units if unit.is_block]
    around = sum(unit.weight_bytes(ranks) for unit in units if not unit.is_block)
    weights = 2 * max((unit.weight_bytes(ranks) for unit in blocks), default=0)
    gradients = 2 * max((unit.grad_bytes(ranks) for unit in units), default=0)
    owned = [
        param for param, owner in zip(optimizer.slots, owners(config, optimizer), strict=True) if owner is not None
    ]
    step = 3 * max((param.numel() * param.dtype.itemsize for param in owned), default=0)
    if "step" in phase:
        return step
    if "backward" in phase:
        of_owner = {"in_backward": step, "project_in_backward": step // 3}.get(config.strategy.when, 0)
        return around + weights + max(gradients, of_owner)
    return 0 if phase == "checkpoint" else around + weights
