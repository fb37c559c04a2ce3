"""Error feedback: what compression left out of one gradient is added to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.kernels.affine import Affine, dequantize_affine, empty_affine, quantize_affine
from lowrank_train.kernels.pieces import row_runs
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Slot, State, counter, tensor_of

BITS = {"int8": 8, "int4": 4}


@dataclass
class ErrorFeedback:
    """A = G + E;  E <- A - up(down(A)). A full-size buffer, which is the price.

    LDAdam also feeds back what the rotation of the first moment lost, through `momentum` = b1 / (1 - b1):
    E <- A - up(low) + momentum (up_old(m) - up(C m)). The buffer is E's own: published code keeps it in p.grad, where
    clipping, logging and zero_grad spoil it.

    With `retained` a share of what the subspace took stays in the buffer too: E <- A - (1 - retained) up(low). That is
    Trion's momentum (arXiv 2505.17967), of which only the directions in use decay.

    With `storage` E is kept as 8- or 4-bit codes, each row between its own least and greatest number: 1 or 1/2 byte a
    number and 5 bytes a row (DCT-AdamW, arXiv 2505.17967). What the codes lose is lost. While one matrix is compressed
    its E is there whole, in float32 at least.
    """

    momentum: float = 0.0  # b1 / (1 - b1) times the rotation's loss; 0: none
    retained: float = 0.0  # of up(low), Trion's mu; 0: E is the error alone
    storage: Literal["state", "int8", "int4"] = "state"  # state: in the dtype of all optimizer state

    def __post_init__(self) -> None:
        if not 0 <= self.retained < 1:
            raise ValueError(f"strategy.feedback.retained is {self.retained}; it must be from 0 to below 1")

    def init(self, param: Tensor, slot: Slot) -> State:
        if self.storage == "state":
            return {"error": torch.zeros_like(param, dtype=slot.dtype)}
        width = param.shape[1]
        empty = empty_affine(param.shape, bits=BITS[self.storage], group=width, device=param.device)
        return {f"error.{name}": value for name, value in vars(empty).items()} | {"error.width": width}

    def add(self, grad: Tensor, state: State) -> Tensor:
        """The gradient with the error, in the gradient's memory."""
        if self.storage == "state":
            return grad.add_(tensor_of(state, "error"))
        for rows in row_runs(grad):
            grad[rows].add_(self._decoded(rows, state))
        return grad

    def before_move(self, source: Tensor, state: State, subspace: Subspace) -> Tensor:
        """With the basis and the moment that are about to change: A + momentum up_old(m), where E is made of it."""
        if self.storage == "state":
            error = tensor_of(state, "error").copy_(source)
        else:
            error = source.to(torch.promote_types(source.dtype, torch.float32), copy=True)
        if self.momentum and "exp_avg" in state:
            subspace.up(tensor_of(state, "exp_avg").to(error.dtype), state, source.shape).add_to_(error, self.momentum)
        return error

    def after_move(self, error: Tensor, low: Tensor, state: State, subspace: Subspace) -> None:
        """With the new ones: E <- E - up(low + momentum C m), stored."""
        kept = low
        if self.momentum and "exp_avg" in state:
            kept = low + self.momentum * tensor_of(state, "exp_avg").to(low.dtype)
        subspace.subtract_(error, kept.to(error.dtype), state, 1.0 - self.retained)
        if self.storage != "state":
            for rows in row_runs(error):
                self._encode(error[rows], rows, state)

    def _encode(self, error: Tensor, rows: slice, state: State) -> None:
        largest = error.abs().amax(1)
        largest = torch.where(largest > 0, largest, 1.0)  # gradients may be smaller than the least range of the codes
        coded = quantize_affine(error / largest[:, None], bits=BITS[self.storage], group=error.shape[1])
        codes, scale, zero = self._parts(rows, state)
        codes.copy_(coded.codes)
        scale.copy_(coded.scale * largest)
        zero.copy_(coded.zero)

    def _decoded(self, rows: slice, state: State) -> Tensor:
        width = counter(state, "error.width")
        shape = (rows.stop - rows.start, width)
        return dequantize_affine(Affine(*self._parts(rows, state)), shape, bits=BITS[self.storage], group=width)

    def _parts(self, rows: slice, state: State) -> list[Tensor]:
        """Views of codes, scales and zeros of these rows."""
        codes, scale, zero = (tensor_of(state, f"error.{name}") for name in ("codes", "scale", "zero"))
        first, last = (bound * counter(state, "error.width") for bound in (rows.start, rows.stop))
        if self.storage == "int4":
            first, last = first // 2, -(-last // 2)
        return [codes[first:last], scale[rows], zero[rows]]
