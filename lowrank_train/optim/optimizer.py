"""The one optimizer: any Transform per group of parameters, stepping after or inside the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.activity import Activity, wake
from lowrank_train.optim.exact_optimizer import ExactOptimizer, bytes_by_kind
from lowrank_train.optim.fast_forward import Previous
from lowrank_train.optim.groups import Group, listed
from lowrank_train.optim.hooks import BackwardHooks
from lowrank_train.optim.ranks import Ranks, ranks_for
from lowrank_train.optim.refusals import When, refuse_impossible
from lowrank_train.optim.rounded_weights import RoundedWeights
from lowrank_train.optim.together import step_small
from lowrank_train.optim.transform import Rates, Slot, State, Transform
from lowrank_train.optim.update_stats import UpdateStats, norm, total_norm


class TransformOptimizer(ExactOptimizer):
    """Applies p <- p - lr * transform(grad) with decoupled weight decay.

    when="after_backward": all in step().
    when="project_in_backward": each gradient of a compressing group is compressed and freed as soon as it exists, in
        every micro-batch; step() does the rest. Equal to after_backward bit for bit without accumulation.
    when="in_backward": during step(closure) each parameter is updated and its gradient freed inside the backward
        pass. No accumulation and no global clipping: both need gradients that are gone.

    A parameter whose gradient is not finite is left alone for that update, its state with it, and counted.
    Tensors whose rule has no use for a gradient yet are asleep: they ask for none, and nothing touches them.
    State is tensors and integers; saving and loading keeps every bit and dtype.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        lr: float,
        weight_decay: float = 0.0,
        when: When = "after_backward",
        grad_clip: float | None = None,
        clip_norm_of: Literal["full", "projected"] = "full",
        micro_batches: int = 1,
        basis_under_accumulation: Literal["window", "first_micro_batch"] = "window",
        rounding: Rounding = "nearest",
        count_lost_updates: bool = False,
        remember: bool = False,
    ) -> None:
        """rounding, count_lost_updates: see RoundedWeights, stats["lost_updates_pct"]; remember: see Previous."""
        self.when: When = when
        self.base_lr = lr  # before any schedule
        self.grad_clip = grad_clip
        self.clip_norm_of = clip_norm_of
        self.micro_batches = micro_batches
        self.hold_window = when == "project_in_backward" and micro_batches > 1 and basis_under_accumulation == "window"
        self.transforms: list[Transform] = []
        self.slots: dict[Tensor, Slot] = {}
        self.transform_of: dict[Tensor, Transform] = {}
        self.rounded_weights = RoundedWeights(rounding, count_lost_updates)
        self.previous = Previous(remember)
        self.ranks = Ranks()  # until the processes of a run have found each other
        self._hooks = BackwardHooks(self)
        self._pending: dict[Tensor, Tensor] = {}  # compressed gradients of this window
        self._remarked: set[str] = set()
        self._current = UpdateStats()
        self.stats: dict[str, Any] = UpdateStats().as_dict()
        groups = list(groups)
        self._take_in(groups)
        refuse_impossible(
            when,
            clipped=grad_clip is not None,
            clip_norm_of=clip_norm_of,
            micro_batches=micro_batches,
            needs_gradient=any(transform.needs_gradient for transform in self.transforms),
            accumulates=all(transform.accumulates for transform in self.transforms),
        )
        super().__init__([listed(group, lr) for group in groups], {"lr": lr, "weight_decay": weight_decay})
        for param in self.slots:
            wake(param)  # what an earlier optimizer left asleep
        self._begin_service()

    def regroup(self, groups: Iterable[Group]) -> None:
        """Serve these parameters from now on. State of those that stay is kept, of those that are gone it is freed."""
        groups = list(groups)
        self.ranks = ranks_for(groups, self.ranks, self.rounded_weights.rounding)
        groups = self.ranks.take_in(groups)
        self.transforms, self.slots, self.transform_of = [], {}, {}
        self._take_in(groups)
        first = self.param_groups[0]
        lr, weight_decay = first["lr"] / first["lr_ratio"], first["weight_decay"]
        self.param_groups[:] = [
            listed(group, lr)
            | {
                "params": [param for _, param in group.params],
                "param_names": [name for name, _ in group.params],
                "weight_decay": weight_decay,
            }
            for group in groups
        ]
        for param in [param for param in self.state if param not in self.slots]:
            del self.state[param]
        self.rounded_weights.keep_only(self.slots)
        self.zero_grad()
        self._begin_service()

    def forget(self, param: Tensor) -> None:
        """Drop the state of a parameter: its next update is its first."""
        tensor = self.ranks.served(param)
        self.state.pop(tensor, None)
        self.rounded_weights.renew(tensor)

    def mask(self, param: Tensor, keep: Callable[[str, Tensor], Tensor]) -> None:
        """Multiply each moment of a parameter with keep(its name, itself); its step count goes on."""
        tensor = self.ranks.served(param)
        if tensor in self.state:
            rule, state = self.transform_of[tensor], self.state[tensor]
            rule.mask(state, self.ranks.masking(tensor, rule, state, keep))

    def lr(self, param: Tensor) -> float:
        """The learning rate that stands for a parameter now."""
        return float(self._group_of(self.ranks.served(param))["lr"])

    @property
    def parameters(self) -> set[Tensor]:
        """The parameters of the model that are in service."""
        return {self.ranks.parameter(tensor) for tensor in self.slots}

    def _take_in(self, groups: list[Group]) -> None:
        """Note the rule and the slot of each parameter; ValueError where the two do not fit."""
        for group in groups:
            self.transforms.append(group.transform)
            for (_, param), slot in zip(group.params, group.slots, strict=True):
                shape = self.ranks.like(param).shape
                fault = group.transform.misfit(shape)
                if fault is not None:
                    raise ValueError(f"{slot.name} of shape {tuple(shape)}: {fault}")
                self.slots[param] = slot
                self.transform_of[param] = group.transform

    def _begin_service(self) -> None:
        self._hooks.register()
        self._activity = Activity(self.transform_of, self.slots, self.ranks)
        self._activity.follow(self.state)

    def initialize(self) -> None:
        """Create all state now instead of at the first update; on meta parameters it is only counted."""
        for param in filter(self.ranks.is_kept, self.slots):
            self._state(param)
            self.rounded_weights.state(param)
        self.previous.note(self.slots)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the state tensors that exist, by kind, and of what several tensors share."""
        bytes_of = bytes_by_kind(self.kept_of(param) for param in self.slots)
        pairs = zip(self.transforms, self.param_groups, strict=True)
        shared = sum(transform.shared_bytes(map(self.ranks.like, group["params"])) for transform, group in pairs)
        return bytes_of | ({"shared": shared} if shared else {})

    @torch.compiler.disable  # bases, counters and codes change: as a graph it would be compiled at every step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        self.previous.note(self.slots)
        if closure is not None:
            self._hooks.armed = self.when == "in_backward"
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self._hooks.armed = False
        self._take_step()
        self.ranks.finish(self)
        self.stats = self._current.as_dict()
        self._current = UpdateStats()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.ranks.free_gradients()
        self._pending.clear()

    def _take_step(self) -> None:
        """Everything that no hook has consumed, in the order of the groups."""
        self.ranks.make_common(self)
        self._measure_gradients()
        clips = None if self.grad_clip is None else self.clip_norm_of
        factor = self._clip_factor(total_norm(self._current.norms)) if clips == "full" else 1.0
        if clips == "projected":
            for param, _ in self.ranks.in_rounds(self, self._ready(), updating=False):
                self._compress(param)
            factor = self._clip_factor(self.ranks.total_low_norm(self))
        for param, group in self.ranks.in_rounds(self, step_small(self, self._ready(), factor), factor):
            self._update(param, group, factor)
        self._pending.clear()
        self._activity.advance(self._state)
        self._activity.follow(self.state)

    def _awake(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        asleep = self._activity.asleep
        return ((param, group) for group in self.param_groups for param in group["params"] if param not in asleep)

    def _ready(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters with a whole or a compressed gradient."""
        return [item for item in self._awake() if item[0].grad is not None or item[0] in self._pending]

    def _measure_gradients(self) -> None:
        """Norms of the gradients at hand; those that are not finite are dropped. One synchronisation for all."""
        unmeasured = [param for param, _ in self._ready() if self.slots[param].name not in self._current.norms]
        if unmeasured:
            norms = self.ranks.norms(self, unmeasured)
            for param, value, number in zip(unmeasured, norms, torch.stack(norms).tolist(), strict=True):
                self._record(param, value, math.isfinite(number))
        for param, _ in self._ready():
            if self.slots[param].name in self._current.skipped:  # perhaps in one micro-batch of several
                param.grad = None
                self._pending.pop(param, None)

    def _record(self, param: Tensor, gradient_norm: Tensor, finite: bool) -> None:
        name = self.slots[param].name
        if finite:
            self._current.norms[name] = gradient_norm
        else:
            self._current.skipped[name] = None
            param.grad = None
            self._pending.pop(param, None)

    def _clip_factor(self, total: float) -> float:
        """As torch.nn.utils.clip_grad_norm_: at most 1, with its 1e-6 against division by zero."""
        assert self.grad_clip is not None
        return min(1.0, self.grad_clip / (total + 1e-6))

    def _state(self, param: Tensor) -> State:
        state: State = self.state[param]
        if not state:
            rule = self.transform_of[param]
            state.update(rule.init(self.ranks.like(param), self.slots[param]))
            self.ranks.keep_own(param, rule, state)
        return state

    def _compress(self, param: Tensor) -> Tensor:
        """The window's compressed gradient of `param`; its full gradient is freed where nothing else needs it."""
        transform, state, slot = self.transform_of[param], self._state(param), self.slots[param]
        if not transform.compresses:
            assert param.grad is not None
            low = param.grad
        elif param.grad is None or (transform.needs_gradient and param in self._pending):
            low = self._pending[param]
        else:
            move = self.ranks.moves.pop(param, None)
            low = self._current.compressed(transform, param.grad, state, slot.name, self._remarked, move)
            if param in self._pending:
                low = self._pending[param].add_(low)
            self._pending[param] = low
            if not transform.needs_gradient:
                param.grad = None
        self._current.low_norms[slot.name] = norm(low)
        return low

    def _update(self, param: Tensor, group: dict[str, Any], factor: float) -> None:
        transform, state = self.transform_of[param], self._state(param)
        if factor != 1.0 and not transform.accumulates and param.grad is not None and param not in self._pending:
            param.grad.mul_(factor)  # before the error of earlier updates joins it, which clipping must not scale
            factor = 1.0
        rates = Rates(group["lr"], self.base_lr * group["lr_ratio"])
        decay = group["weight_decay"] and rates.lr * group["weight_decay"] * transform.decay_scale(param)
        slot, whole = self.slots[param], None if param in self._pending else param.grad
        low_norm = self.rounded_weights.at_once(transform, whole, state, param, slot, rates, decay, factor)
        if low_norm is not None:
            self._current.low_norms[slot.name] = low_norm
        else:
            low = self._compress(param)
            if factor != 1.0:
                low.mul_(factor)
                if transform.compresses and param.grad is not None and param.grad is not low:
                    param.grad.mul_(factor)
            grad = param.grad if transform.needs_gradient else None
            lost = self.rounded_weights.apply(transform, low, state, param, slot, rates, decay, grad)
            self._current.count_lost(lost, param)
            self._pending.pop(param, None)
        transform.settle(state, rates)
        if transform.needs_gradient or low_norm is not None:
            param.grad = None  # it served as workspace

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(member is param for member in group["params"]))

    def _measure_one(self, param: Tensor) -> None:
        """The norm of what a hook has at hand; dropped if it is not finite."""
        (value,) = self.ranks.norms(self, [param])
        self._record(param, value, math.isfinite(value.item()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._activity.follow(self.state)
