"""Steps on the direction and the length of each row apart: GradNormLoRP's weight normalisation, as lift and as rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.optim.direction import Direction, wide
from lowrank_train.optim.lift import Lift
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Rates, Slot, State, Transform, tensor_of

PREFIX = "length_"
NO_RATES = Rates(0.0, 0.0)  # Adam asks for none


def row_lengths(tensor: Tensor) -> Tensor:
    """(M, 1) for a matrix, (1,) for a vector, which is one row."""
    return torch.linalg.vector_norm(wide(tensor), dim=-1, keepdim=True)


@dataclass
class Renormalised(Direction):
    """V' = V + alpha D,  g' = |V| + alpha u,  V <- g' V' / |V'|, row by row; `stretch` <- |V'| / g'."""

    along: Direction  # D (M, N)
    lengths: Direction  # u (M, 1)
    unit: Tensor  # (M, N): V / |V|
    stretch: Tensor  # (M, 1)

    def raw(self) -> Tensor:
        """To first order in the step: D without its part along V, and u along V."""
        along = self.along.tensor()
        return along + (self.lengths.tensor() - (along * self.unit).sum(-1, keepdim=True)) * self.unit

    def add_to_(self, param: Tensor, alpha: float) -> None:
        lengths = row_lengths(param)
        self.along.add_to_(param, alpha * self.factor)
        self.lengths.add_to_(lengths, alpha * self.factor)
        new_lengths = row_lengths(param)
        param.mul_((lengths / new_lengths).to(param.dtype))
        self.stretch.copy_(new_lengths / lengths)


def initial(rule: Adam, param: Tensor, slot: Slot) -> State:
    """State of the lengths: their moments, and by how much V is longer than the weights."""
    wide_dtype = torch.promote_types(slot.dtype, torch.float32)  # it multiplies the weights at every update
    lengths = torch.ones(*param.shape[:-1], 1, dtype=wide_dtype, device=param.device)
    return {f"{PREFIX}stretch": lengths} | {f"{PREFIX}{k}": v for k, v in rule.init(lengths, slot).items()}


def renormalised(rule: Adam, along: Direction, grad: Tensor, state: State, param: Tensor) -> Renormalised:
    """The direction from D and the gradient of W = g V / |V| with respect to g; `param` becomes V."""
    param.mul_(tensor_of(state, f"{PREFIX}stretch").to(param.dtype))
    unit = param / row_lengths(param).to(param.dtype)
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    lengths = rule.update((grad * unit).sum(-1, keepdim=True), own, param, NO_RATES)
    state[f"{PREFIX}step"] = own["step"]
    return Renormalised(along, lengths, unit, tensor_of(state, f"{PREFIX}stretch"))


@dataclass
class WeightNorm(Lift):
    """W = g V / |V|, row by row: V steps by scale * up(u), the lengths g by an Adam of their own (arXiv 2412.19616).

    As the published code: g is |V| again at the start of each update, so that what the lengths have learnt shows in the
    weights between two updates and is then thrown away, and the gradient of V keeps its part along V. That code stores
    V, a second copy of the weights; here V is the weights times one number a row.
    """

    scale: float = 0.25
    betas: tuple[float, float] = (0.9, 0.999)  # of the lengths
    eps: float = 1e-6
    correct_bias: bool = True

    row_wise = True

    def __post_init__(self) -> None:
        self.needs_gradient = True
        self._lengths = Adam(self.betas, self.eps, eps_inside=False, correct_bias=self.correct_bias)

    def init(self, param: Tensor, slot: Slot) -> State:
        return initial(self._lengths, param, slot)

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        assert grad is not None
        along = subspace.up(low_update.raw(), state, param.shape).scaled(self.scale * low_update.factor)
        return renormalised(self._lengths, along, grad, state, param)


@dataclass
class WeightNormAdam(Transform):
    """The same without a subspace, for the other parameters: V steps by Adam; a vector is one row."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    correct_bias: bool = True
    weight_decay_first: bool = False

    def __post_init__(self) -> None:
        self._rule = Adam(self.betas, self.eps, eps_inside=False, correct_bias=self.correct_bias)

    def init(self, param: Tensor, slot: Slot) -> State:
        return self._rule.init(param, slot) | initial(self._rule, param, slot)

    def row_wise(self, param: Tensor, slot: Slot) -> bool:
        """A vector is one row, however many numbers it has."""
        return param.ndim > 1

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        along = self._rule.update(compressed, state, param, rates)
        return renormalised(self._rule, along, compressed, state, param)
