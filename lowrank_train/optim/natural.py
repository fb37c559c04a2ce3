"""Adam on the natural gradient of the small gradient, with a Fisher matrix from its last few values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.optim.direction import Direction, wide
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.transform import Change, Rates, Slot, State, counter, tensor_of


@dataclass
class NaturalAdam(Adam):
    """x <- F^-1 x, F = damping I + H H^T over the last `history` small gradients, the newest included; then Adam.

    Natural GaLore (arXiv 2410.16029). A (history, history) system is all that is solved, and not by the paper's form
    after Woodbury, x/d - H (I + H^T H / d)^-1 H^T x / d^2, whose terms cancel where gradients are large: x is a column
    of H, x = H e, so that F^-1 x = H (d I + H^T H)^-1 e, exactly. The history keeps coordinates of old bases unless it
    is rotated, and costs `history` times the small gradient.
    """

    history: int = 20
    damping: float = 1e-3

    elementwise = False  # the Fisher matrix is one for all numbers

    def init(self, param: Tensor, slot: Slot) -> State:
        past = torch.zeros(self.history, param.numel(), dtype=slot.dtype, device=param.device)
        gram = torch.zeros(self.history, self.history, dtype=torch.float64, device=param.device)
        return super().init(param, slot) | {"history": past, "history_gram": gram}

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        past, gram, seen = tensor_of(state, "history"), tensor_of(state, "history_gram"), counter(state, "step")
        slot, filled = seen % self.history, min(seen + 1, self.history)
        past[slot].copy_(compressed.flatten())
        rows = wide(past[:filled])
        gram[slot, :filled] = gram[:filled, slot] = (rows @ rows[slot]).double()  # the rest of H^T H stays what it was
        values, vectors = torch.linalg.eigh(gram[:filled, :filled])  # below 0 is rounding
        natural = rows.T @ (vectors @ (vectors[slot] / (values.clamp_min(0) + self.damping))).to(rows.dtype)
        return super().update(natural.view_as(compressed), state, param, rates, grad)

    def rotate(self, state: State, change: Change) -> None:
        super().rotate(state, change)
        past, shape = tensor_of(state, "history"), tensor_of(state, "exp_avg").shape
        for row in past:
            row.copy_(change(row.view(shape)).flatten())
        tensor_of(state, "history_gram").copy_(wide(past) @ wide(past).T)
