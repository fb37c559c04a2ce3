"""Adam whose quotient is an angle, which needs no eps and does not depend on the scale of the loss: Adam-atan2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.kernels.pieces import pieces
from lowrank_train.optim.direction import Direction, wide
from lowrank_train.optim.moments import Adam, Elementwise, check_betas
from lowrank_train.optim.transform import Change, Rates, Slot, State, counter, tensor_of


@dataclass
class Angle(Direction):
    """factor * atan2(numerator, times * sqrt(square)), elementwise; 0 where both are 0."""

    numerator: Tensor
    square: Tensor
    times: float

    def raw(self) -> Tensor:
        return torch.atan2(wide(self.numerator), wide(self.square).sqrt().mul_(self.times))

    def add_to_(self, param: Tensor, alpha: float) -> None:
        for into, numerator, square in pieces(param, self.numerator, self.square):
            into.add_(Angle(numerator, square, self.times).raw(), alpha=alpha * self.factor)


@dataclass
class AdamAtan2(Elementwise):
    """direction = a atan2(m / c1, b sqrt(v / c2)), m and v Adam's moments (Everett et al., arXiv 2407.05872).

    c1 = 1 - b1^t, c2 = 1 - b2^t. Where the quotient is small this is a / b times Adam's direction with eps = 0, and it
    is never above a pi / 2. With a = 4 / pi, which the usual code rounds to 1.27, and b = 1 a first update is as large
    as Adam's. Multiplying all gradients by one number changes nothing.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    a: float = 1.27
    b: float = 1.0
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        check_betas("AdamAtan2", self.betas)
        for name in ("a", "b"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"AdamAtan2's {name} is {getattr(self, name)}; it must be a finite number above 0")
        self._moments = Adam(self.betas)

    def init(self, param: Tensor, slot: Slot) -> State:
        return self._moments.init(param, slot)

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        step = state["step"] = counter(state, "step") + 1
        self._moments.take_in(compressed, state)
        correction1, correction2 = 1 - self.betas[0] ** step, 1 - self.betas[1] ** step
        times = self.b * correction1 / math.sqrt(correction2)
        return Angle(tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq"), times, factor=self.a)

    def rotate(self, state: State, change: Change) -> None:
        self._moments.rotate(state, change)
