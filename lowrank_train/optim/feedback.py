"""Error feedback: what compression left out of one gradient is added to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Slot, State, tensor_of


@dataclass
class ErrorFeedback:
    """A = G + E;  E <- A - up(down(A)). A full-size buffer, which is the price.

    LDAdam also feeds back what the rotation of the first moment lost, through `momentum` = b1 / (1 - b1):
    E <- A - up(low) + momentum (up_old(m) - up(C m)). The buffer is E's own: published code keeps it in p.grad, where
    clipping, logging and zero_grad spoil it.

    With `retained` a share of what the subspace took stays in the buffer too: E <- A - (1 - retained) up(low). That is
    Trion's momentum (arXiv 2505.17967), of which only the directions in use decay.
    """

    momentum: float = 0.0  # b1 / (1 - b1) times the rotation's loss; 0: none
    retained: float = 0.0  # of up(low), Trion's mu; 0: E is the error alone

    def __post_init__(self) -> None:
        if not 0 <= self.retained < 1:
            raise ValueError(f"strategy.feedback.retained is {self.retained}; it must be from 0 to below 1")

    def init(self, param: Tensor, slot: Slot) -> State:
        return {"error": torch.zeros_like(param, dtype=slot.dtype)}

    def add(self, grad: Tensor, state: State) -> Tensor:
        """The gradient with the error, in the gradient's memory."""
        return grad.add_(tensor_of(state, "error"))

    def before_move(self, source: Tensor, state: State, subspace: Subspace) -> None:
        """With the basis and the moment that are about to change: E <- A + momentum up_old(m)."""
        error = tensor_of(state, "error").copy_(source)
        if self.momentum and "exp_avg" in state:
            subspace.up(tensor_of(state, "exp_avg").to(error.dtype), state, source.shape).add_to_(error, self.momentum)

    def after_move(self, low: Tensor, state: State, subspace: Subspace) -> None:
        """With the new ones: E <- E - up(low + momentum C m)."""
        error = tensor_of(state, "error")
        kept = low
        if self.momentum and "exp_avg" in state:
            kept = low + self.momentum * tensor_of(state, "exp_avg").to(low.dtype)
        subspace.subtract_(error, kept.to(error.dtype), state, 1.0 - self.retained)
