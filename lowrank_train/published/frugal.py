"""FRUGAL from its published options: subspace by decomposition, at random or by coordinates; Adam, Lion or SGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_train.optim.blocks import Blocks, BlockSchedule
from lowrank_train.optim.direction import Dense, Direction
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject, Lift, StateFreeResidual
from lowrank_train.optim.moments import Lion
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.coordinates import Coordinates
from lowrank_train.optim.subspace.random import Orthonormal
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of
from lowrank_train.published.options import SIDES, Options, Recipe, leading, torch_adam


@dataclass
class Sgd(Transform):
    """b <- momentum b + (1 - dampening) g; direction = b, g + momentum b with nesterov, or its sign.

    FRUGAL's: after every reset b starts at the gradient itself (`starts_at` gradient), and that of a parameter outside
    the subspace at the weights, a fault of the code that is kept for replaying it; 0 is what momentum means.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    sign_update: bool = False
    starts_at: Literal["zero", "gradient", "weights"] = "zero"

    def init(self, param: Tensor, slot: Slot) -> State:
        return {"fresh": 1, "momentum_buffer": torch.zeros_like(param, dtype=slot.dtype)} if self.momentum else {}

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        direction = compressed
        if self.momentum:
            buffer = tensor_of(state, "momentum_buffer")
            if counter(state, "fresh") and self.starts_at != "zero":
                buffer.copy_(param if self.starts_at == "weights" else compressed)
            state["fresh"] = 0
            buffer.mul_(self.momentum).add_(compressed, alpha=1 - self.dampening)
            direction = compressed.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return Dense(direction.sign() if self.sign_update else direction)


@dataclass
class Permuted(Orthonormal):
    """Basis vectors of single coordinates, kept as dense vectors: FRUGAL's `randperm`."""

    def find(self, matrix: Tensor, state: State) -> dict[str, Tensor]:
        found = {}
        for key in self._keys(state):
            basis = tensor_of(state, key)
            generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))
            chosen = torch.randperm(basis.shape[0], generator=generator)[: basis.shape[1]]
            found[key] = torch.eye(basis.shape[0])[:, chosen].to(basis)
        return found


def frugal_lift(options: Options) -> Lift:
    rule = options.choose("inactive_update_rule", "sign_sgd", ("sign_sgd", "sgd", "no"))
    scale, inactive = options.take("proj_params_lr_scale", 1.0), options.take("inactive_lr_scale", 1.0)
    if rule == "no":
        return Backproject(scale)
    return StateFreeResidual(scale, "sgd" if rule == "sgd" else "sign", inactive)


def dense_subspace(options: Options) -> Subspace | None:
    """None where density is 0: no subspace."""
    kind = options.choose("proj_type", "svd", ("svd", "random", "randperm"))
    arguments: dict[str, Any] = {
        "rank": None,
        "density": options.take("density", 0.25),
        "every": options.take("update_gap", 200),
        "side": options.choose("proj_side", "std", SIDES),
    }
    if arguments["density"] == 0:
        return None
    if kind == "svd":
        return leading(options, **arguments)
    return Permuted(**arguments) if kind == "randperm" else Orthonormal(**arguments)


def coordinate_subspace(options: Options) -> Subspace | None:
    """None where density is 0: no subspace."""
    of: dict[str, Literal["columns", "rows", "entries"]] = {"columns": "columns", "rows": "rows", "randk": "entries"}
    choice = options.choose("coord_choice", "columns", list(of))
    every, density = options.take("update_gap", 200), options.take("density", 0.25)
    return Coordinates(every=every, density=density, of=of[choice]) if density else None


def state_free(options: Options, rest: Transform, decay: float) -> Recipe:
    """What elsewhere serves the part outside the subspace serves the whole matrix, and keeps no state."""
    lift = frugal_lift(options)
    if not isinstance(lift, StateFreeResidual):
        raise ValueError(f"{options.method}: density is 0 and inactive_update_rule is no, so that nothing is trained")
    options.ignore("reset_statistics")  # there are none
    rule: Any = "sign" if lift.residual == "sign" else "sgd"
    schedule = BlockSchedule(
        "tensors", density=0.0, inactive=rule, inactive_scale=lift.residual_scale, scale=lift.scale
    )
    return Recipe(Blocks(rest, schedule), rest, options.take("weight_decay", decay))


def composed(options: Options, subspace: Subspace | None, inner: Transform, rest: Transform, decay: float) -> Recipe:
    if subspace is None:
        return state_free(options, rest, decay)
    on_refresh: Literal["reset", "keep"] = "reset" if options.take("reset_statistics", True) else "keep"
    projected = InSubspace(subspace, inner, frugal_lift(options), on_refresh)
    return Recipe(projected, rest, options.take("weight_decay", decay))


def with_adam(options: Options, subspace: Subspace | None) -> Recipe:
    adam = torch_adam(options)
    return composed(options, subspace, adam, adam, 0.01 if options.published else 0.0)


def with_lion(options: Options, subspace: Subspace | None) -> Recipe:
    lion = Lion(tuple(options.take("betas", (0.9, 0.99))))
    return composed(options, subspace, lion, lion, 0.0)


def with_sgd(options: Options, subspace: Subspace | None) -> Recipe:
    arguments = {name: options.take(name, default) for name, default in (("momentum", 0.0), ("dampening", 0.0))}
    arguments |= {name: options.take(name, False) for name in ("nesterov", "sign_update")}
    inner, rest = Sgd(**arguments), Sgd(**arguments)
    if options.published:
        inner.starts_at, rest.starts_at = "gradient", "weights"
    return composed(options, subspace, inner, rest, 0.0)


METHODS: dict[str, Callable[[Options], Recipe]] = {
    "frugal": lambda options: with_adam(options, dense_subspace(options)),
    "frugal_coord": lambda options: with_adam(options, coordinate_subspace(options)),
    "frugal_lion": lambda options: with_lion(options, dense_subspace(options)),
    "frugal_coord_lion": lambda options: with_lion(options, coordinate_subspace(options)),
    "frugal_sgd": lambda options: with_sgd(options, dense_subspace(options)),
    "frugal_coord_sgd": lambda options: with_sgd(options, coordinate_subspace(options)),
}
