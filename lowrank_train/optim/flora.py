"""Flora: Adafactor whose first moment alone is compressed, by a random projection that is drawn and never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.adafactor import Adafactor, rms
from lowrank_train.optim.direction import Dense, Direction, wide
from lowrank_train.optim.subspace.base import BasisSource
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of


@dataclass
class Flora(Transform):
    """Momentum in a random subspace of the normalised update (Hao et al., arXiv 2402.03293, algorithm 2).

    u = Adafactor's normalised gradient; d = (1 - b1) u + b1 up(M); M <- b1 M + (1 - b1) down(u); W <- W - lr clip(d).
    Every kappa updates M moves to a new projection: M <- down_new(up_old(M)), before it takes in u. Entries N(0, 1/R).
    Vectors and matrices that are smaller than R, or longer than 4 times their width, keep a full first moment.
    """

    rank: int = 16
    kappa: int = 1000
    beta1: float | None = 0.9
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    scale_parameter: bool = True
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        self.needs_gradient = True
        self.source: BasisSource | None = None
        self._second = Adafactor(self.eps, math.inf, self.decay_rate)

    def init(self, param: Tensor, slot: Slot) -> State:
        state = self._second.init(param, slot) | {"seed": slot.seed, "refreshes": 0}
        if self.beta1:
            shape: Any = param.shape
            if self._compressed(param):
                rows, columns = param.shape
                shape = (self.rank, columns) if rows < columns else (rows, self.rank)
            state["exp_avg"] = torch.zeros(shape, dtype=slot.dtype, device=param.device)
            if self.source is not None and self._compressed(param):
                state["projection"] = torch.zeros(self._projection_shape(param), dtype=slot.dtype, device=param.device)
        return state

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return rms(wide(param)).clamp_min(self.eps[1]) if self.scale_parameter else 1.0

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        normalised = self._second.update(compressed, state, param, rates).tensor()
        update = self._with_momentum(normalised, state, param) if self.beta1 else normalised
        update.div_((rms(update) / self.clip_threshold).clamp_min(1.0))
        if self.scale_parameter:
            update.mul_(self.decay_scale(param))
        return Dense(update)

    def _with_momentum(self, normalised: Tensor, state: State, param: Tensor) -> Tensor:
        assert self.beta1 is not None
        moment = tensor_of(state, "exp_avg")
        if not self._compressed(param):
            moment.mul_(self.beta1).add_(normalised, alpha=1 - self.beta1)
            return wide(moment).clone()
        step = counter(state, "step")
        projection = self._projection(state, param, step if step == 1 else 0).to(normalised.dtype)
        decompressed = self._up(wide(moment), projection, param)
        update = (1 - self.beta1) * normalised + self.beta1 * decompressed
        if step % self.kappa == 0:
            state["refreshes"] = counter(state, "refreshes") + 1
            projection = self._projection(state, param, step).to(normalised.dtype)
            moment.copy_(self._down(decompressed, projection, param))
        moment.mul_(self.beta1).add_(self._down(normalised, projection, param), alpha=1 - self.beta1)
        return update

    def _compressed(self, param: Tensor) -> bool:
        return param.ndim == 2 and min(param.shape) >= self.rank and max(param.shape) <= 4 * min(param.shape)

    def _projection_shape(self, param: Tensor) -> tuple[int, int]:
        rows, columns = param.shape
        return (self.rank, rows) if rows < columns else (columns, self.rank)

    def _projection(self, state: State, param: Tensor, step: int) -> Tensor:
        """(R, M) for a wide matrix, else (N, R), from the seed and the number of moves."""
        if self.source is not None:
            given = self.source(counter(state, "seed"), step, param) if step else None
            if given is not None:
                tensor_of(state, "projection").copy_(given)
            return tensor_of(state, "projection")
        generator = torch.Generator().manual_seed(counter(state, "seed") + counter(state, "refreshes"))
        drawn = torch.randn(self._projection_shape(param), generator=generator, device="cpu") / math.sqrt(self.rank)
        return drawn.to(param.device)

    @staticmethod
    def _up(low: Tensor, projection: Tensor, param: Tensor) -> Tensor:
        return projection.T @ low if param.shape[0] < param.shape[1] else low @ projection.T

    @staticmethod
    def _down(full: Tensor, projection: Tensor, param: Tensor) -> Tensor:
        return projection @ full if param.shape[0] < param.shape[1] else full @ projection
