"""Adafactor: a second moment that is factored into the means of its rows and of its columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_train.kernels.pieces import pieces, row_runs
from lowrank_train.optim.direction import Direction, Factored, LineScaled, wide
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of


@dataclass
class Adafactor(Transform):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) as in transformers: factored second moment, clipped update.

    b2 = 1 - t^decay_rate; q = g^2 + eps; row and column means of q, averaged with b2; u = g / sqrt(row col / mean row);
    u <- u / max(1, RMS(u) / clip_threshold). With beta1 the average runs over lr-scaled updates, as published. A tensor
    (..., M, N) keeps (..., M) and (..., N) numbers; a vector keeps its whole second moment. The gradient is read a few
    rows at a time, and no temporary is as large as it is.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = False  # times max(eps[1], RMS of the weights)
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        if any(not 0 <= eps < math.inf for eps in self.eps):
            raise ValueError(f"Adafactor's eps is {list(self.eps)}; both must be at least 0")
        if not self.clip_threshold > 0:
            raise ValueError(f"Adafactor's clip_threshold is {self.clip_threshold}; it must be above 0")
        if not self.decay_rate < 0:
            raise ValueError(f"Adafactor's decay_rate is {self.decay_rate}; it must be below 0, as -0.8")
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            raise ValueError(
                f"Adafactor's beta1 is {self.beta1}; it must lie in [0, 1), or be null for no first moment"
            )

    def init(self, param: Tensor, slot: Slot) -> State:
        like = torch.empty_like(param, dtype=slot.dtype)
        state: State = {"step": 0}
        if param.ndim >= 2:
            state |= {"exp_avg_sq_row": like.new_zeros(param.shape[:-1])}
            state |= {"exp_avg_sq_col": like.new_zeros(param.shape[:-2] + param.shape[-1:])}
        else:
            state["exp_avg_sq"] = torch.zeros_like(like)
        if self.beta1 is not None:
            state["exp_avg"] = torch.zeros_like(like)
        return state

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        update = self.normalised(compressed, state)
        size = (sum_of_squares(update) / compressed.numel()).sqrt()
        update = replace(update, row=update.row * self.decay_scale(param) / (size / self.clip_threshold).clamp_min(1.0))
        if self.beta1 is None:
            return update
        exp_avg = tensor_of(state, "exp_avg")
        for rows in row_runs(exp_avg):
            average = wide(exp_avg[rows]).mul_(self.beta1)
            average.add_(update.rows_of(rows), alpha=(1 - self.beta1) * rates.lr)
            if average.dtype != exp_avg.dtype:  # it is stored narrower
                exp_avg[rows].copy_(average)
        return LineScaled(exp_avg, update.row.new_ones(1), factor=1 / rates.lr if rates.lr else 0.0)

    def normalised(self, gradient: Tensor, state: State) -> Factored:
        """u before it is clipped, left unevaluated, with the second moment advanced."""
        step = state["step"] = counter(state, "step") + 1
        if gradient.ndim < 2:
            average = self._averaged(tensor_of(state, "exp_avg_sq"), wide(gradient).square().add_(self.eps[0]), step)
            return Factored(gradient, average.rsqrt(), average.new_ones(()))
        of_rows, of_columns = mean_squares(gradient, self.eps[0])
        row = self._averaged(tensor_of(state, "exp_avg_sq_row"), of_rows, step)
        column = self._averaged(tensor_of(state, "exp_avg_sq_col"), of_columns, step)
        row = (row / row.mean(-1, keepdim=True)).rsqrt_()
        return Factored(gradient, row.unsqueeze(-1), column.rsqrt().unsqueeze(-2))

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return rms(param).clamp_min(self.eps[1]) if self.scale_parameter else 1.0

    def _averaged(self, stored: Tensor, new: Tensor, step: int) -> Tensor:
        """stored <- b2 stored + (1 - b2) new; returned as wide as it was computed, rounded once where it is stored."""
        average = wide(stored)
        average.lerp_(new.to(average.dtype), step**self.decay_rate)
        if average is not stored:
            stored.copy_(average)
        return average


def mean_squares(gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Means of g^2 + eps over the columns (..., M) and over the rows (..., N), a few rows at a time."""
    of_rows, of_columns = [], []
    for rows in row_runs(gradient):
        squares = wide(gradient[rows]).square()
        of_rows.append(squares.mean(-1))
        of_columns.append(squares.sum(-2))
    column_sums = torch.cat(of_columns) if gradient.ndim > 2 else torch.stack(of_columns).sum(0)
    return torch.cat(of_rows).add_(eps), (column_sums / gradient.shape[-2]).add_(eps)


def sum_of_squares(update: Factored) -> Tensor:
    """0-dimensional, a few rows at a time."""
    return torch.stack([update.rows_of(rows).square_().sum() for rows in row_runs(update.value)]).sum()


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square, 0-dimensional, in float32 or wider, without a copy of the whole."""
    norms = [torch.linalg.vector_norm(wide(piece)) for (piece,) in pieces(tensor)]
    return torch.linalg.vector_norm(torch.stack(norms)) / math.sqrt(tensor.numel())
