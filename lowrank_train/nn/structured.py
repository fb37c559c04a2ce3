"""Structured layers: two factors of which one or both are block diagonal (Wei et al., arXiv 2406.16450)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.guided import GuidedLinear, SelfGuided
from lowrank_train.nn.reparam import Origin, ReparamLinear, normal


@dataclass
class BlockDense(SelfGuided):
    """W = L2 diag(L1_1 ... L1_b): a block-diagonal (r, n) factor, then a dense (m, r) one."""

    rank: int = 256
    blocks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(rank=self.rank, blocks=self.blocks)
        if self.rank % self.blocks:
            raise ValueError(
                f"strategy.weights.rank is {self.rank}; it must be a multiple of strategy.weights.blocks={self.blocks}"
            )

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.blocks:
            return f"strategy.weights.blocks is {self.blocks}, which does not divide the input's size {shape[1]}"
        return super().misfit(shape)

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return BlockDenseLinear(linear, self, origin)


class BlockDenseLinear(GuidedLinear):
    """y = blocks(x) L2^T + bias, with L1 (blocks, rank / blocks, in_features / blocks), L2 (out_features, rank)."""

    choice = BlockDense
    weights: BlockDense

    def __init__(self, linear: nn.Linear, weights: BlockDense, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        blocks, rank = weights.blocks, weights.rank
        self.L1 = _orthogonal((blocks, rank // blocks, self.in_features // blocks), linear, origin, "L1")
        self.L2 = _orthogonal((self.out_features, rank), linear, origin, "L2")
        self.begin_guidance_()

    def product(self) -> Tensor:
        wide = torch.promote_types(self.L1.dtype, torch.float32)
        second = self.L2.to(wide).unflatten(1, (self.weights.blocks, -1))
        return torch.einsum("mbr,brn->mbn", second, self.L1.to(wide)).flatten(1)

    def through_factors(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(block_diagonal(x, self.L1), self.L2, bias)


@dataclass
class BlockShuffle(SelfGuided):
    """W = P' diag(L2) P diag(L1), the Monarch form: two block-diagonal factors, and shuffles P, P' that mix blocks.

    P, P' take index s b + l to l (size / b) + s or back, so that each block of L2 sees every block of L1. With n < m
    the blocks of L1 are (n/b, n/b) and those of L2 (m/b, n/b), else (m/b, n/b) and (m/b, m/b).
    """

    blocks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(blocks=self.blocks)

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if shape[0] % self.blocks or shape[1] % self.blocks:
            return f"strategy.weights.blocks is {self.blocks}, which does not divide both of {shape[0]} x {shape[1]}"
        return None

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return BlockShuffleLinear(linear, self, origin)


class BlockShuffleLinear(GuidedLinear):
    """y = unshuffle(blocks of L2(shuffle(blocks of L1(x)))) + bias; L1 (blocks, k/b, n/b), L2 (blocks, m/b, k/b) with
    k = min(out_features, in_features)."""

    choice = BlockShuffle
    weights: BlockShuffle

    def __init__(self, linear: nn.Linear, weights: BlockShuffle, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        blocks = weights.blocks
        rows, columns, inner = (
            size // blocks for size in (*linear.weight.shape, min(self.in_features, self.out_features))
        )
        self.L1 = _orthogonal((blocks, inner, columns), linear, origin, "L1")
        self.L2 = _orthogonal((blocks, rows, inner), linear, origin, "L2")
        self.begin_guidance_()

    def product(self) -> Tensor:
        wide = torch.promote_types(self.L1.dtype, torch.float32)
        identity = torch.eye(self.in_features, dtype=wide, device=self.L1.device)
        return self._through(identity, self.L1.to(wide), self.L2.to(wide)).T

    def through_factors(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = self._through(x, self.L1, self.L2)
        return out if bias is None else out + bias

    def _through(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        blocks = self.weights.blocks
        mixed = block_diagonal(x, first).unflatten(-1, (-1, blocks)).transpose(-1, -2).flatten(-2)
        return block_diagonal(mixed, second).unflatten(-1, (blocks, -1)).transpose(-1, -2).flatten(-2)


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """(..., b n) through b blocks, (b, m, n) -> (..., b m): x diag(blocks)^T as one batched product."""
    number, rows, columns = blocks.shape
    pieces = x.reshape(-1, number, columns).transpose(0, 1)
    out = torch.bmm(pieces, blocks.transpose(1, 2)).transpose(0, 1)
    return out.reshape(*x.shape[:-1], number * rows)


def _orthogonal(shape: tuple[int, ...], linear: nn.Linear, origin: Origin, name: str) -> nn.Parameter:
    """The polar factor U V^T of normal matrices: all singular values are 1."""
    like = linear.weight.detach()
    drawn = normal(shape, 1.0, like, origin.generator(name))  # the std that the polar factor does not see
    if like.is_meta:
        return nn.Parameter(drawn)
    left, _, right = torch.linalg.svd(drawn.to(torch.promote_types(like.dtype, torch.float32)), full_matrices=False)
    return nn.Parameter((left @ right).to(like.dtype).contiguous())


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"strategy.weights.{name} is {value}; it must be at least 1")
