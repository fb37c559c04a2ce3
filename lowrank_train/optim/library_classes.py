"""Finding an optimizer class by name, checking its options, and observing what kind of rule it is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.config.suggest import nearest
from lowrank_train.optim.library_state import flatten

PACKAGE = "pytorch_optimizer"
MORE = "the package pytorch-optimizer has many more: pip install lowrank_train[optimizers]"
OURS = {
    "APOLLO": "strategy=apollo",
    "Fira": "strategy=fira",
    "GaLore": "strategy=galore",
    "AdamMini": "adam_mini for strategy/inner or strategy/rest",
}
"""Classes that project only groups with keys of their own, and are plain Adam for all others; and one that goes by the
names in a whole model, and keeps a single second moment for each matrix whose name it does not know."""

SHAPE = (12, 20)  # of the tensor that a class is observed on
STEPS = 12  # past the sixth and the tenth, at which some look ahead or renew a basis
LR = 2.0**-6  # powers of two scale without rounding
SAME = 1e-5  # relative difference of two float64 runs above which they differ by more than rounding


class CannotBeRun(ValueError):
    """The class is no rule for one tensor at a time; the message is the reason."""


@dataclass(frozen=True)
class Traits:
    """What a class with given options was seen to do."""

    reads_weights: bool  # its update depends on where the weights are
    proportional_to_lr: bool  # its update is lr times something that neither weights nor any lr ever enter


def class_of(name: str) -> type[torch.optim.Optimizer]:
    """The class of this name, of torch.optim or else of pytorch_optimizer. ValueError with the nearest for neither."""
    package, _, wanted = name.rpartition(".")
    if package not in ("", "torch.optim", PACKAGE):
        raise ValueError(f"library's name is {name}; before the dot stands torch.optim or {PACKAGE}, or nothing at all")
    known: dict[str, type[torch.optim.Optimizer]] = {}
    for module in ("torch.optim", PACKAGE):
        if package in ("", module) and importlib.util.find_spec(module) is not None:
            known = _classes(importlib.import_module(module)) | known
        found = {key.lower(): cls for key, cls in known.items()}.get(wanted.lower())
        if found is not None and found.__name__ in OURS:
            raise ValueError(f"library's name is {name}; choose {OURS[found.__name__]} instead, which is ours")
        if found is not None:
            return found
    close = nearest(wanted, known)
    hint = f". Did you mean {close}?" if close else ""
    more = f"; {MORE}" if importlib.util.find_spec(PACKAGE) is None else ""
    raise ValueError(f"library's name is {name}: there is no such optimizer{hint}{more}")


def _classes(module: ModuleType) -> dict[str, type[torch.optim.Optimizer]]:
    found = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    return {
        key: value
        for key, value in found.items()
        if issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def checked_arguments(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the class but for lr; without weight decay of its own where none is asked for.

    ValueError for an option that the class does not name, even if it would swallow it, or one that is missing.
    """
    parameters = dict(list(inspect.signature(cls).parameters.items())[1:])  # without the tensors
    named = {
        name: item for name, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    taken = [name for name in named if name != "lr"]
    for name in options:
        if name == "lr":
            raise ValueError(f"{cls.__name__}'s lr is optim.lr, with its schedule; leave lr out here")
        if name not in taken:
            close = nearest(name, taken)
            hint = f". Did you mean {close}?" if close else f". It takes: {', '.join(taken)}"
            raise ValueError(f"{cls.__name__} has no option {name}{hint}")
    first = next(iter(inspect.signature(cls).parameters), "")
    missing = [name for name in taken if named[name].default is inspect.Parameter.empty and name not in options]
    if first != "params" or "lr" not in named:
        raise CannotBeRun(f"{cls.__name__} is not built from parameters and a learning rate, as a rule for a tensor is")
    if missing:
        raise CannotBeRun(f"{cls.__name__} needs {', '.join(missing)} as well")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise CannotBeRun(f"{cls.__name__} computes the loss again within its step, which a rule for a tensor cannot")
    arguments = {name: _tuples(value) for name, value in options.items()}
    return ({"weight_decay": 0.0} if "weight_decay" in named else {}) | arguments


def _tuples(value: Any) -> Any:
    """Lists of a configuration as tuples, as which optimizers take their betas."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def observe(cls: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> Traits:
    """Run the class on a small tensor and see what its update depends on. CannotBeRun with the reason it cannot be."""
    if callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None)):
        raise CannotBeRun(f"{cls.__name__} trains other weights than those that are to be evaluated")
    trial = _Trial(cls, arguments)
    try:
        plain = trial.run()
        alone, company = trial.run(stay=True), trial.run(stay=True, company=True)
    except Exception as error:  # it is foreign code, and whatever it raises is the reason
        reason = str(error).strip().splitlines() or [""]
        raise CannotBeRun(f"{cls.__name__} cannot be run on a tensor: {type(error).__name__}: {reason[0]}") from error
    if not all(move.isfinite().all() for move in plain.moves):
        raise CannotBeRun(f"{cls.__name__} made numbers that are not finite, of gradients that are")
    if plain.hidden:
        raise CannotBeRun(
            f"{cls.__name__} keeps {', '.join(plain.hidden)} outside the state of its tensors: no run could resume"
        )
    if plain.random:
        raise CannotBeRun(f"{cls.__name__} draws random numbers that no run could draw again when it resumes")
    named = inspect.signature(cls).parameters
    internal = {key: value for key, value in plain.group.items() if key not in named}
    for value, name in ((plain.state, "rule"), (internal, "group")):
        try:
            flatten(value, name)
        except TypeError as error:
            raise CannotBeRun(f"{cls.__name__} keeps state that cannot be stored safely: {error}") from None
    shared = [key for key, value in alone.group.items() if not same(value, company.group.get(key))]
    if shared or _differ(alone.moves, company.moves):
        what = f" ({', '.join(shared)})" if shared else ""
        raise CannotBeRun(f"{cls.__name__} couples all tensors of a group by a common number{what}")
    moved = trial.run(stay=True, start=trial.beside_last_gradient())
    reads_weights = _differ(plain.moves, alone.moves) or _differ(plain.moves, moved.moves)
    lrs = [LR, LR / 2, LR / 4] * (STEPS // 3)
    varied = trial.run(lrs=lrs).moves
    proportional = not reads_weights and not _differ(
        [move * (LR / lr) for move, lr in zip(varied, lrs, strict=True)], plain.moves
    )
    if proportional:
        at_one = trial.run(lrs=[1.0] * STEPS, built_with=1.0).moves
        proportional = not _differ([move * LR for move in at_one], plain.moves)
    return Traits(reads_weights, proportional)


@dataclass
class _Seen:
    """What a run on the small tensor left behind."""

    moves: list[Tensor]
    state: dict[str, Any]
    group: dict[str, Any]
    hidden: list[str]  # attributes of the optimizer that changed, and state that is no tensor's
    random: bool  # torch's generator was used


class _Trial:
    def __init__(self, cls: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> None:
        self.cls, self.arguments = cls, arguments
        generator = torch.Generator().manual_seed(0)
        self.grads = [torch.randn(SHAPE, generator=generator, dtype=torch.float64, device="cpu") for _ in range(STEPS)]
        self.other = torch.randn(SHAPE, generator=generator, dtype=torch.float64, device="cpu") * 10

    def beside_last_gradient(self) -> Tensor:
        """Weights whose rows are at right angles to those of the last gradient, which AdamP looks out for."""
        last = self.grads[-1]
        weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
        return weights - (weights * last).sum(1, keepdim=True) / last.square().sum(1, keepdim=True) * last

    @torch.no_grad()
    def run(
        self,
        *,
        lrs: Sequence[float] = (LR,) * STEPS,
        built_with: float = LR,
        start: Tensor | None = None,
        stay: bool = False,  # where the step has led; else back to the start before each
        company: bool = False,  # of a second tensor in the group
    ) -> _Seen:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            param = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64) if start is None else start.clone())
            other = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
            rule = self.cls([param, other] if company else [param], lr=built_with, **self.arguments)  # type: ignore[call-arg]
            group, moves = rule.param_groups[0], []
            attributes, numbers = _attributes(rule), torch.get_rng_state()
            for grad, lr in zip(self.grads, lrs, strict=True):
                before = param.detach().clone() if stay else param.zero_().detach().clone()
                group["lr"] = lr
                param.grad, other.grad = grad.clone(), self.other.clone()
                rule.step()
                moves.append(param.detach() - before)
            hidden = [key for key, value in _attributes(rule).items() if value != attributes.get(key)]
            hidden += [str(key) for key in rule.state if not isinstance(key, Tensor)]
            hidden += ["lr"] if group["lr"] != lrs[-1] else []
            random = not torch.equal(numbers, torch.get_rng_state())
        values = {key: value for key, value in group.items() if key not in ("params", "lr")}
        return _Seen(moves, dict(rule.state[param]), values, hidden, random)


def _attributes(rule: torch.optim.Optimizer) -> dict[str, str]:
    """The optimizer's own attributes in words; state and groups are looked at by themselves."""
    return {key: repr(value) for key, value in vars(rule).items() if key not in ("state", "param_groups", "defaults")}


def _differ(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return any(not (a - b).norm() <= SAME * b.norm() for a, b in zip(left, right, strict=True))


def same(left: Any, right: Any) -> bool:
    """Equality of values that may be tensors."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.dtype == right.dtype and torch.equal(left, right))
    return type(left) is type(right) and not isinstance(left, Tensor) and bool(left == right)
