"""SLTrain: a weight that is a product of two thin matrices plus a sparse one on a fixed random support."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_train.kernels.sparse_lowrank import dense_matrix, sparse_lowrank_linear
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, uniform


@dataclass
class SLTrain(Weights):
    """W = s B A + S, s = alpha / rank, with a share sp_ratio of the entries of S (Han et al., arXiv 2406.02214).

    The matrix that a layer is built from is dropped: W is S alone at the start, since B = 0.
    """

    rank: int = 128
    alpha: float = 32.0
    sp_ratio: float = 0.03  # of the entries of W are also in S
    trainable_scaling: bool = False  # s = tanh(a trained number that starts at 1) instead of alpha / rank

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")
        if not 0 < self.sp_ratio <= 1:
            raise ValueError(f"strategy.weights.sp_ratio is {self.sp_ratio}; it must lie in (0, 1]")
        if self.alpha == 0:
            raise ValueError("strategy.weights.alpha is 0, which leaves A and B without gradients")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def entries(self, shape: tuple[int, int]) -> int:
        """How many entries S has in a matrix of this shape."""
        return int(self.sp_ratio * shape[0] * shape[1])

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if self.entries(shape) == 0:
            return f"strategy.weights.sp_ratio is {self.sp_ratio}, which leaves no entry of {shape[0]} x {shape[1]}"
        return super().misfit(shape)

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return SLTrainLinear(linear, self, origin)


class SLTrainLinear(ReparamLinear):
    """y = x (s B A + S)^T + bias, with A (rank, in_features), B (out_features, rank).

    `lora_A` and `lora_B` are the factors, `sparse_value` the entries of S and `sparse_index` where they are: ascending
    row-major flat indices into (out_features, in_features), which never change. `scaling`, (1,), only where it is
    trained.
    """

    choice = SLTrain
    weights: SLTrain

    def __init__(self, linear: nn.Linear, weights: SLTrain, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        like, bound = linear.weight.detach(), 1 / math.sqrt(self.in_features)
        count = weights.entries((self.out_features, self.in_features))
        first = uniform((weights.rank, self.in_features), bound, like, origin.generator("lora_A"))
        self.lora_A = nn.Parameter(first)
        self.lora_B = nn.Parameter(like.new_zeros(self.out_features, weights.rank))
        self.sparse_value = nn.Parameter(uniform((count,), bound, like, origin.generator("sparse_value")))
        self.sparse_index: Tensor
        self.register_buffer("sparse_index", self._support(count, like.device))
        self.scaling = nn.Parameter(like.new_ones(1)) if weights.trainable_scaling else None

    @property
    def A(self) -> nn.Parameter:
        """`lora_A`, by the paper's letter."""
        return self.lora_A

    @property
    def B(self) -> nn.Parameter:
        """`lora_B`, by the paper's letter."""
        return self.lora_B

    def dense_weight(self) -> Tensor:
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        first, second, values = (tensor.to(wide) for tensor in (self.lora_A, self.lora_B, self.sparse_value))
        return dense_matrix(self._scale() * first, second, values, self.sparse_index)

    def forward(self, x: Tensor) -> Tensor:
        return sparse_lowrank_linear(
            x, self.lora_A, self.lora_B, self._scale(), self.sparse_value, self.sparse_index, self.bias
        )

    def _scale(self) -> Tensor | float:
        return self.weights.scale if self.scaling is None else self.scaling.tanh()

    def _support(self, count: int, device: torch.device) -> Tensor:
        """Where S has entries; on meta nothing is drawn."""
        total = self.out_features * self.in_features
        dtype = torch.int32 if total < 2**31 else torch.int64
        if device.type == "meta":
            return torch.empty(count, dtype=dtype, device=device)
        return random_support(total, count, self.origin.generator("sparse_index")).to(device, dtype)


def random_support(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the numbers below `total`, ascending, int64; every choice is equally likely.

    Memory goes with `count`: indices are drawn with repetition until enough differ, and the surplus is dropped at
    random. A permutation of all, as published, would take 8 bytes for each entry of the matrix.
    """
    if 2 * count > total:
        chosen = torch.ones(total, dtype=torch.bool, device="cpu")
        chosen[random_support(total, total - count, generator)] = False
        return chosen.nonzero().flatten()
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(found) < count:
        short = count - len(found)
        more = torch.randint(total, (short + short // 8 + 16,), generator=generator, device="cpu")
        found = torch.cat((found, more)).unique()
    stays = torch.randperm(len(found), generator=generator, device="cpu")[:count]
    return found[stays.sort().values]
