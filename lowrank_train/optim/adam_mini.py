"""Adam with one second moment for a whole block of numbers: Adam-mini."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

from lowrank_train.kernels.pieces import pieces, row_runs
from lowrank_train.optim.direction import Direction, LineScaled, wide
from lowrank_train.optim.moments import check_betas
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform, counter, tensor_of

QUERIES_AND_KEYS = ("q_proj", "k_proj", "wq", "wk", "query", "key")
"""Parts of the names of the matrices whose rows are grouped by heads, as the published code has them."""


@dataclass
class AdamMini(Transform):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) mean(g^2), one v a block (Zhang et al., arXiv 2406.16793);
    direction = (m / c1) / (sqrt(v / c2) + eps), c1 = 1 - b1^t, c2 = 1 - b2^t.

    The blocks of a (M, N) matrix are its rows; of queries and keys (`row_heads`), the `head_dim` rows of each head. A
    bias has a v for every number, and any other vector one v. In a subspace a block is a line that is not compressed:
    a row of the small (M, R), a column of (R, N). v is float32 at least, since it costs next to nothing. Weight decay
    leaves vectors alone, as published.

    Published code knows matrices by their names, and gives those it does not know a single v, with which runs diverge.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    head_dim: int = 64  # rows of a head: hidden size / number of heads
    row_heads: list[str] = field(default_factory=lambda: [f"*{name}*" for name in QUERIES_AND_KEYS])
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        check_betas("AdamMini", self.betas)
        self.needs_lines = True
        if self.eps <= 0:
            raise ValueError(f"AdamMini's eps is {self.eps}; it must be above 0")
        if self.head_dim < 1:
            raise ValueError(f"AdamMini's head_dim is {self.head_dim}; it must be at least 1")

    def init(self, param: Tensor, slot: Slot) -> State:
        dtype = torch.promote_types(slot.dtype, torch.float32)
        return {
            "step": 0,
            "exp_avg": torch.zeros_like(param, dtype=slot.dtype),
            "exp_avg_sq": torch.zeros(self._blocks(param.shape, slot), dtype=dtype, device=param.device),
        }

    def _blocks(self, shape: Size, slot: Slot) -> tuple[int, ...]:
        """The shape of v: that of the tensor with 1 for what is averaged; for heads (heads, 1, 1)."""
        if slot.kept_axis is not None:
            return tuple(length if axis == slot.kept_axis else 1 for axis, length in enumerate(shape))
        name = slot.name.lower()
        if "bias" in name.rpartition(".")[2]:
            return tuple(shape)
        if len(shape) < 2:
            return (1,) * len(shape)
        if len(shape) == 2 and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.row_heads):
            heads, left_over = divmod(shape[0], self.head_dim)
            if left_over:
                raise ValueError(
                    f"AdamMini's head_dim is {self.head_dim}, but {slot.name} has {shape[0]} rows, which are no whole "
                    "number of heads; give hidden size / number of heads"
                )
            return (heads, 1, 1)
        return (shape[0],) + (1,) * (len(shape) - 1)

    def row_wise(self, param: Tensor, slot: Slot) -> bool:
        """Where no block reaches over several rows."""
        blocks = self._blocks(param.shape, slot)
        return len(blocks) == param.ndim and blocks[0] == param.shape[0]

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        step = state["step"] = counter(state, "step") + 1
        exp_avg, exp_avg_sq = tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")
        for narrow, stored in pieces(compressed, exp_avg):
            average = wide(stored).lerp_(wide(narrow), 1 - self.betas[0])
            if average is not stored:  # it is stored narrower
                stored.copy_(average)
        exp_avg_sq.lerp_(mean_squares(compressed, exp_avg_sq), 1 - self.betas[1])
        correction1, root2 = 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)
        scale = exp_avg_sq.sqrt().div_(root2).add_(self.eps).reciprocal_()
        if scale.ndim > compressed.ndim:  # of heads, for each of their rows
            scale = scale.expand(-1, len(compressed) // len(scale), -1).reshape(-1, 1)
        return LineScaled(exp_avg, scale, factor=1 / correction1)

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return 1.0 if param.ndim > 1 else 0.0

    def rotate(self, state: State, change: Change) -> None:
        """m <- C m; the mean square of a line that is not compressed is the same in every basis of the same space."""
        tensor_of(state, "exp_avg").copy_(change(tensor_of(state, "exp_avg")))


def mean_squares(tensor: Tensor, blocks: Tensor) -> Tensor:
    """The mean square of each block, in the shape of `blocks`; reads a few rows at a time."""
    if blocks.shape == tensor.shape:
        return tensor.to(blocks.dtype).square()
    of_columns = blocks.ndim == 2 and blocks.shape[1] == tensor.shape[-1] > 1
    sums = []
    for rows in row_runs(tensor):
        squares = tensor[rows].to(blocks.dtype).square_() if tensor.dtype != blocks.dtype else tensor[rows].square()
        sums.append(squares.sum(0, keepdim=True) if of_columns else squares.reshape(len(squares), -1).sum(1))
    energy = torch.cat(sums).sum(0) if of_columns else torch.cat(sums).view(len(blocks), -1).sum(1)
    return energy.view(blocks.shape).mul_(blocks.numel() / tensor.numel())
