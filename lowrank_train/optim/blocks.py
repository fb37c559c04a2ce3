"""Methods that train some tensors at a time: which are active follows from the number of updates and the seed alone."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.optim.direction import Dense, Direction
from lowrank_train.optim.transform import Move, Rates, Slot, State, Transform, counter

Order = Literal["random", "uniform", "ascending", "descending", "mirror"]

ActivitySource = Callable[[int, int, Tensor], Any]
"""(parameter seed, 1-based update, parameter) -> from that update on, whether it is active: one flag, or the flags of
all tensors of the group in their order; None for the schedule's own choice."""

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.\d+\.")
LAYER_PATTERNS = ("*layers.[0-9]*.*", "*layer.[0-9]*.*", "*h.[0-9]*.*")
"""What is inside a layer, by the names that LLaMA, BERT and GPT-2 give their layers."""


@dataclass
class BlockSchedule:
    """Which blocks are active when, and what becomes of the other tensors meanwhile."""

    by: Literal["layers", "tensors"] = "layers"  # what is a block: the tensors of a layer, or each tensor
    patterns: list[list[str]] | None = None  # in place of `by`: the patterns of names of each block
    count: int | None = None  # blocks active at a time; or density
    density: float | None = None  # share of the blocks that is active at a time, rounded
    every: int = 100  # updates between two switches
    order: Order = "random"
    inactive: Literal["none", "sign", "sgd"] = "none"
    inactive_scale: float = 1.0  # times the learning rate, for inactive tensors
    scale: float = 1.0  # times the learning rate, for all tensors of the schedule
    on_switch: Literal["reset", "keep"] = "reset"  # the state of a tensor that stays active over a switch

    def __post_init__(self) -> None:
        for name in ("count", "every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"strategy.blocks.{name} is {getattr(self, name)}; it must be at least 1")
        if self.density is not None and not 0 <= self.density <= 1:
            raise ValueError(f"strategy.blocks.density is {self.density}; it must lie in [0, 1]")
        if (self.count is None) == (self.density is None):
            raise ValueError("strategy.blocks needs either count or density, and not both")

    def misfits(self, names: tuple[str, ...]) -> list[str]:
        """Why this schedule does not suit the tensors of these names; empty if it does."""
        blocks, faults = self._blocks(names)
        number = len(set(blocks.values()))
        if not faults and self.count is not None and self.count > number:
            faults = [f"strategy.blocks.count is {self.count}, but there are only {number} blocks"]
        if not faults and self.inactive == "none" and self._num_active(number) == 0:
            faults = [
                f"strategy.blocks.density is {self.density}, which of {number} blocks is none, and "
                "strategy.blocks.inactive=none trains nothing else; use inactive=sign, or a larger density"
            ]
        return faults

    def is_active(self, name: str, names: tuple[str, ...], turn: int, seed: int) -> bool:
        """Whether the tensor `name` among `names` is active in the interval number `turn`, counted from 0."""
        blocks, _ = self._blocks(names)
        number = max(blocks.values()) + 1
        return blocks[name] in active_blocks(turn, number, self._num_active(number), self.order, seed)

    def _num_active(self, number: int) -> int:
        return self.count if self.count is not None else round(number * (self.density or 0.0))

    def _blocks(self, names: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
        if self.patterns is not None:
            return _blocks_by_patterns(names, tuple(map(tuple, self.patterns)))
        return _blocks_by_names(names, self.by)


@functools.lru_cache(maxsize=8)
def _blocks_by_patterns(
    names: tuple[str, ...], blocks: tuple[tuple[str, ...], ...]
) -> tuple[dict[str, int], list[str]]:
    """Name -> number of its block, and what is wrong with names and blocks that do not fit."""
    found, faults = {}, []
    for name in names:
        matching = [i for i, patterns in enumerate(blocks) if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        if len(matching) == 1:
            found[name] = matching[0]
        else:
            faults.append(f"{name} is in {len(matching)} of strategy.blocks.patterns; it must be in exactly one")
    faults += [
        f"strategy.blocks.patterns {list(patterns)} match no selected parameter"
        for i, patterns in enumerate(blocks)
        if i not in found.values()
    ]
    return found, faults


@functools.lru_cache(maxsize=8)
def _blocks_by_names(names: tuple[str, ...], by: str) -> tuple[dict[str, int], list[str]]:
    """As above, one block for each layer, or for each tensor."""
    found, faults = {}, []
    numbers: dict[str, int] = {}
    for name in names:
        layer = LAYER.search(name)
        if by == "layers" and layer is None:
            faults.append(f"{name} has no number of a layer in its name; leave it out of strategy.select")
        else:
            key = name[: layer.end()] if layer is not None and by == "layers" else name
            found[name] = numbers.setdefault(key, len(numbers))
    return found, faults


@functools.lru_cache(maxsize=64)
def active_blocks(turn: int, number: int, size: int, order: Order, seed: int) -> frozenset[int]:
    """The `size` of `number` blocks that are active in interval number `turn`, counted from 0.

    uniform: drawn anew for each interval, without replacement. All others go in sweeps, in which every block comes
    once before any comes again: in a new random order each time, ascending, descending, or from both ends (mirror).
    """
    if order == "uniform":
        generator = torch.Generator().manual_seed(seed_from_name(seed, f"interval {turn}"))
        return frozenset(torch.randperm(number, generator=generator, device="cpu")[:size].tolist())
    if order == "random":
        return frozenset(_swept_at_random(turn, number, size, seed))
    places = [position % number for position in range(turn * size, (turn + 1) * size)]
    if order == "mirror":
        return frozenset(number - 1 - place // 2 if place % 2 else place // 2 for place in places)
    return frozenset(places if order == "ascending" else [number - 1 - place for place in places])


def _swept_at_random(turn: int, number: int, size: int, seed: int) -> list[int]:
    """Walks through the sweeps up to `turn`, from the last interval that began a sweep: every `number`-th does."""
    walk, steps = divmod(turn, number)
    generator = torch.Generator().manual_seed(seed_from_name(seed, f"sweeps {walk}"))
    chosen: list[int] = []
    left: list[int] = []
    for _ in range(steps + 1):
        chosen, left = left[:size], left[size:]
        missing = size - len(chosen)
        if missing:  # the sweep ends within this interval; what it has of the old one comes last in the new one
            drawn: list[int] = torch.randperm(number, generator=generator, device="cpu").tolist()
            drawn = [i for i in drawn if i not in chosen] + [i for i in drawn if i in chosen]
            chosen, left = chosen + drawn[:missing], drawn[missing:]
    return chosen


@dataclass
class Blocks(Transform):
    """A rule that runs on the active tensors; on the others the sign of the gradient, the gradient, or nothing.

    FRUGAL's blockwise form (arXiv 2411.07837), where each tensor is a block; BAdam (arXiv 2404.02827) and LISA (arXiv
    2403.17919), where a block is a layer and the others rest. The rule is any other, a subspace's included. A tensor
    that becomes active starts with fresh state, and one that ceases to be loses it. With inactive="none" it asks for no
    gradient either.
    """

    rule: Transform
    schedule: BlockSchedule
    seed: int = 0  # of the order; the same for all tensors, unlike a slot's
    head_start: int = 0  # updates by which the first interval is shorter

    def __post_init__(self) -> None:
        self.clocked = True
        self.needs_gradient = self.rule.needs_gradient
        self.maskable = self.rule.maskable
        self.compresses = self.rule.compresses
        self.accumulates = self.rule.accumulates
        self.weight_decay_first = self.rule.weight_decay_first
        self.source: ActivitySource | None = None  # set by whoever replays a recorded run

    def init(self, param: Tensor, slot: Slot) -> State:
        faults = self.schedule.misfits(slot.group)
        if faults:
            raise ValueError("; ".join(faults))
        state: State = {"updates_seen": 0, "active": 0}
        state["active"] = int(self._chosen(state, param, slot, new_turn=True))
        self.complete(state, param, slot)
        return state

    def misfit(self, shape: torch.Size) -> str | None:
        return self.rule.misfit(shape)

    def row_wise(self, param: Tensor, slot: Slot) -> bool:
        return self.rule.row_wise(param, slot)

    def wants_gradient(self, state: State) -> bool:
        return bool(state["active"]) or self.schedule.inactive != "none"

    def advance(self, state: State, param: Tensor, slot: Slot) -> None:
        before = self._turn(state)
        state["updates_seen"] = counter(state, "updates_seen") + 1
        new_turn = self._turn(state) != before
        active = self._chosen(state, param, slot, new_turn)
        if active != bool(state["active"]) or (new_turn and self.schedule.on_switch == "reset"):
            for key in state.keys() - {"updates_seen", "active"}:
                del state[key]
        state["active"] = int(active)

    def complete(self, state: State, param: Tensor, slot: Slot) -> None:
        if state["active"] and len(state) == 2:
            turn = self._turn(state)  # a rule that draws at random must not draw the same at every visit
            seed = seed_from_name(slot.seed, f"interval {turn}") if turn else slot.seed
            fresh = self.rule.init(param, replace(slot, seed=seed))
            assert not fresh.keys() & state.keys(), f"the rule {self.rule} keeps its own {fresh.keys() & state.keys()}"
            state.update(fresh)

    def shared_bytes(self, params: Iterable[Tensor]) -> int:
        return self.rule.shared_bytes(params)

    def refresh_due(self, state: State) -> bool:
        return bool(state["active"]) and self.rule.refresh_due(state)

    def refresh_counts(self, state: State) -> tuple[int, int]:
        return self.rule.refresh_counts(state) if state["active"] else (0, 0)

    def moves_alone(self, state: State) -> bool:
        return bool(state["active"]) and self.rule.moves_alone(state)

    def moved_keys(self, state: State) -> list[str]:
        return self.rule.moved_keys(state)

    def find(self, grad: Tensor, state: State, grad_factor: float = 1.0) -> Move:
        return self.rule.find(grad, state, grad_factor)

    def compress(self, grad: Tensor, state: State, move: Move | None = None) -> Tensor:
        return self.rule.compress(grad, state, move) if state["active"] else grad

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        if state["active"]:
            direction = self.rule.update(compressed, state, param, rates, grad)
            return direction if self.schedule.scale == 1.0 else direction.scaled(self.schedule.scale)
        assert self.schedule.inactive != "none", "a sleeping tensor has no gradient"
        value = compressed.sign() if self.schedule.inactive == "sign" else compressed
        return Dense(value, factor=self.schedule.scale * self.schedule.inactive_scale)

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        if state["active"] and self.schedule.scale == 1.0:
            self.rule.apply(compressed, state, param, rates, decay, grad)
        else:
            super().apply(compressed, state, param, rates, decay, grad)

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return self.rule.decay_scale(param)

    def settle(self, state: State, rates: Rates) -> None:
        if state["active"]:
            self.rule.settle(state, rates)

    def mask(self, state: State, keep: Callable[[str, Tensor], Tensor]) -> None:
        if state["active"]:
            self.rule.mask(state, keep)

    def _turn(self, state: State) -> int:
        """The number of the interval that the next update belongs to."""
        return (counter(state, "updates_seen") + self.head_start) // self.schedule.every

    def _chosen(self, state: State, param: Tensor, slot: Slot, new_turn: bool) -> bool:
        if self.source is not None:
            given = self.source(slot.seed, counter(state, "updates_seen") + 1, param)
            if given is not None:
                flags = torch.as_tensor(given).flatten()
                return bool(flags[slot.group.index(slot.name) if len(flags) > 1 else 0])
        if not new_turn:
            return bool(state["active"])
        return self.schedule.is_active(slot.name, slot.group, self._turn(state), self.seed)
