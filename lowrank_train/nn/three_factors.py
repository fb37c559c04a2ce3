"""Adapters of three factors made from W0: LoRA-XS and CURLoRA beside it; SVFit, SORSA and LoLDU from a part of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.as_lora import factors_of, lora_options, lora_tensors
from lowrank_train.nn.events import Event, Moments
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept
from lowrank_train.nn.rounding import add_

Factor = Literal["left", "core", "right", "gain"]


@dataclass
class ThreeFactors(Weights):
    """W = W' + s L C R, L (out, rank), C (rank, rank) or a diagonal, R (rank, in), all made from the matrix W0.

    W' is W0, or where a part is taken out of it W0 - s L C R, so that the layer begins as it was.
    """

    rank: int = 8

    trained: ClassVar[tuple[Factor, ...]] = ("core",)  # `gain`: s itself is trained too
    diagonal: ClassVar[bool] = False
    takes_out: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")

    @property
    @abstractmethod
    def scale(self) -> float:
        """s, at the start where it is trained."""

    @abstractmethod
    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        """L, C and R of W0, which is at least float32 and has numbers."""

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return ThreeFactorsLinear(linear, self, origin)

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return lora_options(self.rank, 1.0)


@dataclass
class LoRAXS(ThreeFactors):
    """W = W0 + (alpha / rank) U_r C S_r V_r^T of W0 = U S V^T; C begins as N(0, (1e-5)^2), alone trained (2405.17604).

    The decomposition is exact, where the published code has a randomised one.
    """

    rank: int = 32
    alpha: float = 64.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = leading(weight, self.rank)
        drawn = torch.empty(self.rank, self.rank, device="cpu").normal_(0.0, 1e-5, generator=origin.generator("core"))
        return left, drawn, values[:, None] * right


@dataclass
class CURLoRA(ThreeFactors):
    """W = W0 + alpha W0[:, columns] C W0[rows], C from 0, alone trained (Fawi, arXiv 2408.14572).

    `rank` columns and as many rows are drawn, each anew, with probability proportional to 1 / (p + 0.001), where p is
    the share of a column or row in |W0|_F^2: those that matter least.
    """

    rank: int = 256
    alpha: float = 1.0

    @property
    def scale(self) -> float:
        return self.alpha

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        squares = weight.double().square().cpu()
        chosen = []
        for axis, purpose in ((0, "columns"), (1, "rows")):
            odds = 1 / (squares.sum(axis) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny) + 0.001)
            drawn = torch.multinomial(odds, self.rank, replacement=True, generator=origin.generator(purpose))
            chosen.append(drawn.to(weight.device))
        columns, rows = chosen
        return weight[:, columns], weight.new_zeros(self.rank, self.rank), weight[rows]


@dataclass
class SVFit(ThreeFactors):
    """W = W' + U_r diag(c) V_r^T, where c begins as the leading singular values of W0, alone trained (2409.05926)."""

    rank: int = 128
    rounding: Rounding = "nearest"  # of W' in bfloat16, of which a part is taken; compensated costs 2 bytes a weight

    diagonal: ClassVar[bool] = True
    takes_out: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        return 1.0

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        return leading(weight, self.rank)


@dataclass
class SORSA(SVFit):
    """As SVFit with U_r and V_r trained too, and pulled towards orthonormal columns (Cao, arXiv 2409.00055).

    After every update X <- X - lr * orthonormal * grad of the mean over all L and R of |X^T X - I|_F (R R^T - I for R),
    decoupled from the rule as weight decay is; the published code adds that gradient before AdamW, with
    orthonormal = gamma / lr.
    """

    alpha: float | None = None  # s = alpha / rank; null: 1
    orthonormal: float = 1.0  # gamma / lr

    trained: ClassVar[tuple[Factor, ...]] = ("left", "core", "right")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"strategy.weights.alpha is {self.alpha}; it must be above 0, or null")
        if self.orthonormal < 0:
            raise ValueError(f"strategy.weights.orthonormal is {self.orthonormal}; it must be at least 0")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def swap_(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        super().swap_(model, names, seed)
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, ThreeFactorsLinear)
            layer.layers_in_all = len(names)

    def events(self) -> Sequence[Event]:
        if not self.orthonormal:
            return ()

        def pull(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
            for layer in layers.values():
                assert isinstance(layer, ThreeFactorsLinear)
                share = self.orthonormal / (2 * layer.layers_in_all)
                layer.left.sub_(moments.lr(layer.left) * share * skewness_gradient(layer.left))
                layer.right.sub_(moments.lr(layer.right) * share * skewness_gradient(layer.right.T).T)

        return [Event("pull to orthonormal", pull, first=1, every=1, quiet=True)]

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        return lora_options(2 * self.rank, 1.0)  # what W0 lacks, and what has come of it


@dataclass
class LoLDU(SVFit):
    """W = W' + s P L_r diag(c) U_r of W0 = P L diag(d) U, whose triangles have unit diagonals (arXiv 2410.13618).

    c, which begins as d_r, and s, as alpha / rank, are trained alone.
    """

    alpha: float = 128.0

    trained: ClassVar[tuple[Factor, ...]] = ("core", "gain")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        permutation, lower, upper = torch.linalg.lu(weight)
        pivots, rows = upper.diagonal()[: self.rank], upper[: self.rank]
        divisors = torch.where(pivots == 0, torch.ones_like(pivots), pivots)  # a singular W0 leaves some rows as is
        return permutation @ lower[:, : self.rank], pivots, rows / divisors[:, None]


class ThreeFactorsLinear(ReparamLinear):
    """y = x W'^T + s x R^T C^T L^T + bias, with `weight` W', and L, C, R as `left`, `core`, `right`.

    `core` and `gain` (s, where it is trained) are at least float32: in bfloat16 a small update of a large singular
    value would be lost. With rounding=compensated, `residue` holds what a bfloat16 `weight` cannot of W'.
    """

    choice: ClassVar[type[Weights]] = LoRAXS  # of the others: SVFit(rank=8).layer(linear, Origin())
    weights: ThreeFactors
    layers_in_all = 1  # of the model, over which a mean is taken; events may come to one layer at a time

    def __init__(self, linear: nn.Linear, weights: ThreeFactors, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        weight, rank = linear.weight.detach(), weights.rank
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = kept(weight)
        if weight.is_meta:
            core = weight.new_empty((rank,) if weights.diagonal else (rank, rank))
            made = weight.new_empty(self.out_features, rank), core, weight.new_empty(rank, self.in_features)
        else:
            made = weights.factors(weight.to(wide), origin)
        trained = weights.trained
        left, core, right = made
        self.keep_left_(left.to(weight.dtype).contiguous())
        self.core = nn.Parameter(core.to(weight.device, wide).contiguous())
        self.right = nn.Parameter(right.to(weight.dtype).contiguous(), requires_grad="right" in trained)
        gain = nn.Parameter(torch.full((1,), weights.scale, dtype=wide, device=weight.device))
        self.gain: nn.Parameter | None
        self.register_parameter("gain", gain if "gain" in trained else None)
        rounding: Rounding = getattr(weights, "rounding", "nearest")
        compensated = rounding == "compensated" and weight.dtype.itemsize < 4
        self.residue: Tensor | None
        self.register_buffer("residue", torch.zeros_like(weight) if compensated else None)
        if weights.takes_out and not weight.is_meta:
            with torch.no_grad():  # the product of the factors as they are stored
                add_(self.weight, -self.update_of_weight(), rounding, self.residue, origin, 0)

    @property
    def scale(self) -> Tensor | float:
        """s."""
        return self.weights.scale if self.gain is None else self.gain

    def keep_left_(self, left: Tensor) -> None:
        """Begin with this L."""
        self.left = nn.Parameter(left, requires_grad="left" in self.weights.trained)

    def whole_left(self) -> Tensor:
        """L, however it is kept."""
        return self.left

    def update_of_weight(self) -> Tensor:
        """s L C R in at least float32."""
        left, right = self.whole_left().to(self.core.dtype), self.right.to(self.core.dtype)
        return self.scale * ((left * self.core if self.weights.diagonal else left @ self.core) @ right)

    def dense_weight(self) -> Tensor:
        weight = self.weight.to(self.core.dtype)
        return (weight if self.residue is None else weight + self.residue) + self.update_of_weight()

    @torch.no_grad()
    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        if self.weights.takes_out:
            change = self.dense_weight() - base.to(self.core.dtype)
            return lora_tensors(*factors_of(change, self.weights.as_peft()[1]["r"]))
        return lora_tensors(
            self.core @ self.right.to(self.core.dtype), self.scale * self.whole_left().to(self.core.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        base = self.weight if self.residue is None or x.dtype.itemsize < 4 else self.weight + self.residue
        low = F.linear(x, self.right)
        core = self.core.to(low.dtype)
        low = low * core if self.weights.diagonal else F.linear(low, core)
        scale = self.scale
        update = F.linear(low, self.whole_left()) * (scale.to(low.dtype) if isinstance(scale, Tensor) else scale)
        return F.linear(x, base, self.bias) + update


def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r (out, rank), S_r (rank) and V_r^T (rank, in) of the singular value decomposition."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def skewness_gradient(columns: Tensor) -> Tensor:
    """The gradient of |X^T X - I|_F: 2 X (X^T X - I) / |X^T X - I|_F, and 0 where the columns are orthonormal."""
    wide = columns.to(torch.promote_types(columns.dtype, torch.float32))
    skew = wide.T @ wide - torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    length = torch.linalg.matrix_norm(skew)
    return (2 * (wide @ skew) / torch.where(length == 0, torch.ones_like(length), length)).to(columns.dtype)
