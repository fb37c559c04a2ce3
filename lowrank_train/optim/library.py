"""Any torch-style optimizer class, of torch.optim or of the package pytorch-optimizer, as an update rule."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from lowrank_train.optim.direction import Dense, Direction
from lowrank_train.optim.library_classes import checked_arguments, class_of, observe, same
from lowrank_train.optim.library_state import flatten, unflatten
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of

BEGUN, LIKE = "rule_begun", "rule_like"
PREFIXES = ("rule.", "group.")


@dataclass
class Library(Transform):
    """An optimizer class run on one tensor at a time; its direction is what it does to that tensor, over -lr.

    On a whole tensor of at least float32 it works on the tensor itself, at the learning rate in force: bit for bit what
    the class does when used directly. In a subspace it works on a tensor of zeros of the small shape. There lr is 1 for
    rules whose update is proportional to it, and the one in force for others (Rprop, AdaBound), divided out afterwards;
    at lr 0 nothing moves. Whether it is proportional, whether the rule reads the weights (LAMB, AdamP), which have no
    small copy, and whether it can be run a tensor at a time at all, is observed on a small tensor when it is built.

    State is what the class keeps for the tensor (`rule.exp_avg`) and in its group (`group.step`), its tensors in the
    slot's dtype. Until the first update they are placeholders, which tell the size.
    """

    name: str  # of the class, without regard to case: AdaBelief, or pytorch_optimizer.Lion where both have one
    options: dict[str, Any] = field(default_factory=dict)  # its own, in its own words; no lr, and no decay unless given

    free_keys: ClassVar[str] = "options"  # a configuration writes them beside `name`

    def __post_init__(self) -> None:
        self._class = class_of(self.name)
        self._arguments = checked_arguments(self._class, self.options)
        self._traits = observe(self._class, self._arguments)
        self.reads_weights = self._traits.reads_weights
        self._built: dict[float, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}  # by lr, with its group at first
        self._structures: dict[tuple[Size, torch.dtype], State] = {}

    def misfit(self, shape: Size) -> str | None:
        try:
            self._structure(Size([4] * len(shape)), torch.float32)
        except (ValueError, RuntimeError, IndexError) as error:
            return f"{self.name} takes no such tensor: {error}"
        return None

    def init(self, param: Tensor, slot: Slot) -> State:
        like = torch.empty(0, dtype=slot.dtype, device=param.device)
        state: State = {BEGUN: 0, LIKE: like}
        work = torch.promote_types(slot.dtype, torch.float32)
        for key, value in self._structure(param.shape, work).items():
            if isinstance(value, Tensor):
                device = value.device if value.device.type == "cpu" and param.device.type != "meta" else param.device
                state[key] = torch.zeros(value.shape, dtype=_stored_dtype(value, like), device=device)
            else:
                state[key] = value
        return state

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        work = torch.promote_types(tensor_of(state, LIKE).dtype, torch.float32)
        assert compressed.shape == param.shape or not self.reads_weights, "refused when the parts were put together"
        start = param.detach().to(work) if self.reads_weights else None
        moved = nn.Parameter(compressed.new_zeros(compressed.shape, dtype=work) if start is None else start.clone())
        lr = 1.0 if self._traits.proportional_to_lr else rates.lr
        self._run(moved, compressed.to(work, copy=True), state, lr, self._constructor_lr(rates))
        change = moved.detach() if start is None else moved.detach().sub_(start)
        return Dense(change, factor=-1 / lr if lr else 0.0)

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        if param.dtype != torch.promote_types(tensor_of(state, LIKE).dtype, torch.float32):
            super().apply(compressed, state, param, rates, decay, grad)
            return
        if isinstance(decay, Tensor) or decay != 0:
            param.mul_(1 - decay)
        alias = nn.Parameter(param.detach())  # the same memory, with a gradient of its own
        self._run(alias, compressed.to(param.dtype), state, rates.lr, self._constructor_lr(rates))
        if alias.data_ptr() != param.data_ptr():  # the rule has put another tensor in its place
            param.copy_(alias)

    def _constructor_lr(self, rates: Rates) -> float:
        return 1.0 if self._traits.proportional_to_lr else rates.base_lr

    def _run(self, param: nn.Parameter, grad: Tensor, state: State, lr: float, constructor_lr: float) -> None:
        """One step of the class on `param`, with the state taken from `state` and put back there."""
        begun = bool(counter(state, BEGUN))
        if constructor_lr not in self._built or not begun:  # some fill a tensor's state when they are built
            rule = self._class([param], lr=constructor_lr, **self._arguments)  # type: ignore[call-arg]
            self._built[constructor_lr] = rule, dict(rule.param_groups[0])
        rule, fresh = self._built[constructor_lr]
        group = rule.param_groups[0]
        for key in group.keys() - fresh.keys():
            del group[key]
        group.update(fresh, params=[param], lr=lr)
        param.grad = grad
        like = tensor_of(state, LIKE)
        if begun:
            rule.state = defaultdict(dict)
            rule.state[param] = unflatten(self._opened(state, param), "rule")
            group.update(unflatten(state, "group"))
        rule.step()
        new = flatten(dict(rule.state[param]), "rule") if rule.state[param] else {}
        carried = {k: v for k, v in group.items() if k not in ("params", "lr") and not same(v, fresh.get(k))}
        new |= {key: value for name, item in carried.items() for key, value in flatten(item, f"group.{name}").items()}
        for key in [key for key in state if key.startswith(PREFIXES) and key not in new]:
            del state[key]
        for key, value in new.items():
            self._keep(key, value, state, like)
        state[BEGUN] = 1
        rule.state = defaultdict(dict)  # holds no tensor between two updates
        group["params"] = []

    def _opened(self, state: State, param: Tensor) -> State:
        """The rule's state, tensors as wide as it works on them, and counters where it had put them."""
        structure = self._structure(param.shape, param.dtype)
        opened: State = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and key.startswith("rule."):
                born = structure.get(key)
                if isinstance(born, Tensor) and born.device.type == "cpu" and born.ndim == 0:
                    value = value.to("cpu")  # loading brings all state to the parameter's device
                elif value.is_floating_point() and value.ndim > 0 and value.dtype == tensor_of(state, LIKE).dtype:
                    value = value.to(param.dtype)
            opened[key] = value
        return opened

    @staticmethod
    def _keep(key: str, value: Tensor | int, state: State, like: Tensor) -> None:
        """Put a value back, rounded into the tensor that is there already where it is stored narrower."""
        if not isinstance(value, Tensor) or value.dtype == _stored_dtype(value, like):
            state[key] = value
            return
        there = state.get(key)
        if isinstance(there, Tensor) and there.shape == value.shape and there.dtype == like.dtype:
            there.copy_(value)
        else:
            state[key] = value.to(like.dtype)

    def _structure(self, shape: Size, work: torch.dtype) -> State:
        """The state after one step, found on the meta device, or with real numbers where the class reads some."""
        if (shape, work) not in self._structures:
            try:
                found = self._dry_step(shape, work, "meta")
            except (RuntimeError, NotImplementedError):
                found = self._dry_step(shape, work, "cpu")
                found = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in found.items()}
            self._structures[shape, work] = found
        return self._structures[shape, work]

    def _dry_step(self, shape: Size, work: torch.dtype, device: str) -> State:
        state: State = {BEGUN: 0, LIKE: torch.empty(0, dtype=work)}
        with torch.device("cpu"), torch.no_grad():  # a counter belongs there whatever the default is
            param = nn.Parameter(torch.ones(shape, dtype=work, device=device))
            self._run(param, torch.ones_like(param), state, 1e-3, 1e-3)
        return {key: value for key, value in state.items() if key.startswith(PREFIXES)}


def _stored_dtype(value: Tensor, like: Tensor) -> torch.dtype:
    """Moments are stored in the slot's dtype; numbers, counters and codes stay as they are."""
    work = torch.promote_types(like.dtype, torch.float32)
    return like.dtype if value.ndim > 0 and value.dtype == work else value.dtype
