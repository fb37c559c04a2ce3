"""Flora: Adafactor whose first moment alone is compressed, by a random projection that is drawn and never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_train.kernels.pieces import row_runs
from lowrank_train.optim.adafactor import Adafactor, rms, sum_of_squares
from lowrank_train.optim.direction import Direction, Factored, LineScaled, wide
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
        state = self._second.init(param, slot) | {"projection_seed": slot.seed, "projections": 0}
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
        return rms(param).clamp_min(self.eps[1]) if self.scale_parameter else 1.0

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        """d and its norm follow from what is small, and from u a few rows at a time."""
        u = self._second.normalised(compressed, state)
        if not self.beta1:
            return replace(u, row=u.row * self._scale(sum_of_squares(u), param))
        if not self._compressed(param):
            return self._whole_momentum(u, self.beta1, tensor_of(state, "exp_avg"), param)
        return self._momentum(u, self.beta1, state, param)

    def _scale(self, square: Tensor, param: Tensor) -> Tensor:
        """What clips an update of this sum of squares, times the size of the weights."""
        size = (square.clamp_min(0) / param.numel()).sqrt()
        return self.decay_scale(param) / (size / self.clip_threshold).clamp_min(1.0)

    def _whole_momentum(self, u: Factored, beta1: float, moment: Tensor, param: Tensor) -> Direction:
        squares = []
        for rows in row_runs(param):
            part = moment[rows].mul_(beta1).add_(u.rows_of(rows), alpha=1 - beta1)
            squares.append(wide(part).square().sum())
        return LineScaled(moment, self._scale(torch.stack(squares).sum(), param).to(u.row.dtype).view(1))

    def _momentum(self, u: Factored, beta1: float, state: State, param: Tensor) -> Direction:
        """||(1 - b1) u + b1 up(M)||^2 = (1 - b1)^2 ||u||^2 + 2 b1 (1 - b1) <down(u), M> + b1^2 <M, down(up(M))>."""
        stored, step = tensor_of(state, "exp_avg"), counter(state, "step")
        moment, on_left = stored.to(u.row.dtype), param.shape[0] < param.shape[1]
        projection = self._projection(state, param, step if step == 1 else 0).to(moment.dtype)
        due = step % self.kappa == 0
        if due and self.source is not None:
            projection = projection.clone()  # it lies where the one that is supplied next will
        low, square = self._down(u, projection, moment, on_left)
        again = self._turned(moment, projection, projection, on_left)
        total = (1 - beta1) ** 2 * square + beta1 * ((2 * (1 - beta1) * low + beta1 * again) * moment).sum()
        scale = self._scale(total, param)
        scaled = moment * (scale * beta1)  # before M takes in this update
        left, right = (projection.T, scaled) if on_left else (scaled, projection.T)
        direction = replace(u, row=u.row * (scale * (1 - beta1)), left_MR=left, right_RN=right)
        if due:
            state["projections"] = counter(state, "projections") + 1
            following = self._projection(state, param, step).to(moment.dtype)
            stored.copy_(self._turned(moment, projection, following, on_left))
            low, _ = self._down(u, following, moment, on_left)
        stored.mul_(beta1).add_(low, alpha=1 - beta1)
        return direction

    @staticmethod
    def _down(u: Factored, projection: Tensor, like: Tensor, on_left: bool) -> tuple[Tensor, Tensor]:
        """A u (R, N) or u A (M, R), and the sum of squares of u, which is formed a few rows at a time."""
        low, squares = torch.zeros_like(like), []
        for rows in row_runs(u.value):
            made = u.rows_of(rows)
            if on_left:
                low.addmm_(projection[:, rows], made)
            else:
                torch.mm(made, projection, out=low[rows])
            squares.append(made.square_().sum())
        return low, torch.stack(squares).sum()

    @staticmethod
    def _turned(moment: Tensor, old: Tensor, new: Tensor, on_left: bool) -> Tensor:
        """down_new(up_old(M)), by the small product of the two projections."""
        return (new @ old.T) @ moment if on_left else moment @ (old.T @ new)

    def _compressed(self, param: Tensor) -> bool:
        return param.ndim == 2 and min(param.shape) >= self.rank and max(param.shape) <= 4 * min(param.shape)

    def _projection_shape(self, param: Tensor) -> tuple[int, int]:
        rows, columns = param.shape
        return (self.rank, rows) if rows < columns else (columns, self.rank)

    def _projection(self, state: State, param: Tensor, step: int) -> Tensor:
        """(R, M) for a wide matrix, else (N, R), from the seed and the number of moves."""
        if self.source is not None:
            given = self.source(counter(state, "projection_seed"), step, param) if step else None
            if given is not None:
                tensor_of(state, "projection").copy_(given)
            return tensor_of(state, "projection")
        generator = torch.Generator().manual_seed(counter(state, "projection_seed") + counter(state, "projections"))
        drawn = torch.randn(self._projection_shape(param), generator=generator, device="cpu") / math.sqrt(self.rank)
        return drawn.to(param.device)
