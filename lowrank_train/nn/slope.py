"""SLoPe: two of every four weights kept and stored compressed, a backward pass pruned once more, late adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_train.nn.events import Event, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, normal

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Which two columns of a group of four are kept, by code."""

BLOCK_ROWS = 256  # expanded at a time: the 8-byte indices then stay small beside the matrix; a multiple of 4


@dataclass
class SLoPe(Weights):
    """W = (values at 2 of every 4 columns) + (L R)^T / rank, where L R comes late (arXiv 2405.16325)."""

    mask_change_every: int = 100  # updates between two choices of what the backward pass leaves out
    rank: int = 16  # of the late adapters; the paper: 0.05 % to 6.25 % of the hidden size
    lazy_share: float = 0.01  # of a run, at its end, that has the adapters: the paper's 1 %; 0: none
    lazy_after_steps: int | None = None  # updates before the adapters come, where that is not said by lazy_share

    def __post_init__(self) -> None:
        if self.mask_change_every < 1:
            raise ValueError(f"strategy.weights.mask_change_every is {self.mask_change_every}; it must be at least 1")
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")
        if self.lazy_after_steps is not None and self.lazy_after_steps < 1:
            raise ValueError(f"strategy.weights.lazy_after_steps is {self.lazy_after_steps}; it must be at least 1")

        if not 0 <= self.lazy_share < 1:
            raise ValueError(f"strategy.weights.lazy_share is {self.lazy_share}; it must lie in [0, 1)")

    def set_length(self, steps: int) -> None:
        if self.lazy_after_steps is None and self.lazy_share:
            self.lazy_after_steps = max(1, steps - math.ceil(steps * self.lazy_share))

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[0] % 4 or shape[1] % 4:
            return (
                f"a {shape[0]} x {shape[1]} matrix has no 2:4 masks along both sides, which must be multiples of 4; "
                "leave such layers dense, as with strategy.weights.modules=['*.self_attn.*'], or train a model whose "
                "sizes are, as with model.intermediate_size"
            )
        return super().misfit(shape) if self.lazy_after_steps is not None else None

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return SLoPeLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        renew = each(SLoPeLinear, lambda layer, number, moments: layer.renew_backward_mask_())
        begin = each(SLoPeLinear, lambda layer, number, moments: layer.add_adapters_())
        masks = Event("backward mask", renew, self.mask_change_every, self.mask_change_every, quiet=True)
        if self.lazy_after_steps is None:
            return [masks]
        return [masks, Event("lazy adapters", begin, self.lazy_after_steps, restructures=True)]


class SLoPeLinear(ReparamLinear):
    """y = x W_f^T + (x L R) / rank + bias; the gradient of x goes through W_b, which is W_f pruned along its rows too.

    `values` (out, in / 2) holds W_f row by row, `pattern` (out, in / 4) uint8 which two of each four columns they are
    in (an index of PAIRS), `backward_kept` (out, in / 2) bool which of them W_b has: of every four rows of a column at
    most two. L (in, rank) and R (rank, out) exist once the adapters have come.
    """

    choice = SLoPe
    weights: SLoPe

    def __init__(self, linear: nn.Linear, weights: SLoPe, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        weight = linear.weight.detach()
        rows, columns = weight.shape
        pattern = torch.empty(rows, columns // 4, dtype=torch.uint8, device=weight.device)
        values = weight.new_empty(rows, columns // 2)
        if not weight.is_meta:
            pattern.copy_(pattern_of(weight))
            for block in _blocks(rows):
                values[block] = weight[block].gather(1, columns_of(pattern[block]))
        self.values = nn.Parameter(values)
        self.pattern: Tensor
        self.register_buffer("pattern", pattern)
        self.backward_kept: Tensor
        self.register_buffer("backward_kept", torch.ones_like(values, dtype=torch.bool))
        if not weight.is_meta:
            self.renew_backward_mask_()
        self.L: nn.Parameter | None
        self.R: nn.Parameter | None
        self.register_parameter("L", None)
        self.register_parameter("R", None)

    @torch.no_grad()
    def renew_backward_mask_(self) -> None:
        """Of every four rows of a column, W_b keeps the two entries of W_f that are largest now."""
        for block in _blocks(self.out_features):
            dense = expand(self.values[block], self.pattern[block])
            chosen = keep_two(dense.T.reshape(self.in_features, -1, 4)).reshape(self.in_features, -1).T
            self.backward_kept[block] = chosen.gather(1, columns_of(self.pattern[block]))

    def add_adapters_(self) -> None:
        """L from N(0, 1), R = 0: the output is what it was."""
        shape, rank = (self.in_features, self.weights.rank), self.weights.rank
        self.L = nn.Parameter(normal(shape, 1.0, self.values, self.origin.generator("L")))
        self.R = nn.Parameter(self.values.new_zeros(rank, self.out_features))

    def dense_weight(self) -> Tensor:
        wide = torch.promote_types(self.values.dtype, torch.float32)
        weight = expand(self.values.to(wide), self.pattern)
        if self.L is None or self.R is None:
            return weight
        return weight + (self.L.to(wide) @ self.R.to(wide)).T / self.weights.rank

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = DoublePruned.apply(x, self.values, self.pattern, self.backward_kept)
        if self.bias is not None:
            y = y + self.bias
        if self.L is None or self.R is None:
            return y
        return y + (x @ self.L) @ self.R / self.weights.rank

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        if "L" in shapes and self.L is None:
            self.add_adapters_()


class DoublePruned(torch.autograd.Function):
    """x (..., in) -> x W_f^T; backward: the gradient g of the output (..., out) gives g W_b to x, on purpose not
    g W_f, and to the values the entries of g^T x at their places, whose other entries live for a block of rows only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, pattern: Tensor, backward_kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, pattern, backward_kept)
        return F.linear(x, expand(values.to(x.dtype), pattern))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, pattern, backward_kept = ctx.saved_tensors
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ expand((values * backward_kept).to(grad.dtype), pattern)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_values = torch.empty_like(values)
            left, right = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)
            for block in _blocks(values.shape[0]):
                of_values[block] = (left[:, block].T @ right).gather(1, columns_of(pattern[block]))
        return of_x, of_values, None, None


def keep_two(groups: Tensor) -> Tensor:
    """True at the two entries of largest magnitude of each four, (..., 4); of equals the first."""
    order = groups.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)


def pattern_of(weight: Tensor) -> Tensor:
    """The codes of the pairs that a 2:4 mask by magnitude keeps: (m, n) -> (m, n / 4) uint8."""
    kept = keep_two(weight.reshape(weight.shape[0], -1, 4))
    bits = (kept * torch.tensor([1, 2, 4, 8], device=weight.device)).sum(-1)
    code_of = torch.zeros(16, dtype=torch.uint8, device=weight.device)
    for code, (first, second) in enumerate(PAIRS):
        code_of[(1 << first) + (1 << second)] = code
    return code_of[bits]


def columns_of(pattern: Tensor) -> Tensor:
    """The columns of the kept entries, ascending in each row: (m, n / 4) -> (m, n / 2) int64."""
    within = torch.tensor(PAIRS, device=pattern.device)[pattern.long()]
    first = 4 * torch.arange(pattern.shape[1], device=pattern.device)
    return (first[:, None] + within).flatten(1)


def expand(values: Tensor, pattern: Tensor) -> Tensor:
    """Kept entries (m, n / 2) -> the matrix (m, n), zero elsewhere. Differentiable."""
    dense = values.new_zeros(len(values), 4 * pattern.shape[1])
    for block in _blocks(len(values)):
        dense[block].scatter_(1, columns_of(pattern[block]), values[block])
    return dense


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, rows, BLOCK_ROWS))
