"""LoRA: a frozen matrix and a trained product of two thin ones, folded into it by ReLoRA and its kin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.events import Event, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights, kept, normal, uniform
from lowrank_train.nn.rounding import add_


@dataclass
class LoRA(Weights):
    """W = W0 + s B A, s = alpha / rank; A and B are trained, W0 is kept (Hu et al., arXiv 2106.09685)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what enters A
    rslora: bool = False  # s = alpha / sqrt(rank) (arXiv 2312.03732)
    # kaiming: A uniform in +-1/sqrt(n), B = 0; gaussian: A from N(0, 1/rank^2), B = 0; pissa, olora: the leading part
    # of W0, by SVD (arXiv 2404.02948) or QR (2406.01775), which W0 then lacks; zero: both 0, the dead start of the
    # published ReLoRA, where nothing is learnt before the first merge
    init: Literal["kaiming", "gaussian", "pissa", "olora", "zero"] = "kaiming"
    train_a: bool = True  # false: LoRA-FA (arXiv 2308.03303), which keeps x A^T for backward instead of x
    lr_ratio_b: float = 1.0  # LoRA+ (arXiv 2402.12354): B learns this many times as fast; 16 in its examples
    rounding: Rounding = "nearest"  # how a fold is rounded to a W0 in bfloat16; compensated costs 2 more bytes a weight
    warm_start_steps: int = 0  # updates for which W0 itself is trained, before A and B come

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"strategy.weights.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"strategy.weights.dropout is {self.dropout}; it must lie in [0, 1)")
        if self.lr_ratio_b <= 0:
            raise ValueError(f"strategy.weights.lr_ratio_b is {self.lr_ratio_b}; it must be above 0")
        if self.warm_start_steps < 0:
            raise ValueError(f"strategy.weights.warm_start_steps is {self.warm_start_steps}; it must be at least 0")
        if self.init in ("pissa", "olora") and self.alpha <= 0:
            raise ValueError(f"strategy.weights.alpha is {self.alpha}; init={self.init} needs it above 0")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def leaves_base(self) -> bool:
        """Whether W0 stays what it was when A and B begin."""
        return self.init not in ("pissa", "olora")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LoRALinear(linear, self, origin)

    def lr_ratios(self) -> Mapping[str, float]:
        return {"lora_B": self.lr_ratio_b} if self.lr_ratio_b != 1 else {}

    def as_peft(self) -> tuple[str, dict[str, Any]]:
        if self.warm_start_steps:
            raise ValueError("strategy.weights.warm_start_steps has trained W0 itself, which an adapter does not hold")
        options: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rslora}
        if not self.leaves_base:  # W0 lacks the part it began with: twice the rank says both
            options = {"r": 2 * self.rank, "lora_alpha": 2 * self.rank * self.scale}
        return "LORA", options | {"lora_dropout": self.dropout}

    @property
    def begins_after_steps(self) -> int:
        return self.warm_start_steps

    def events(self) -> Sequence[Event]:
        if not self.warm_start_steps:
            return ()

        begin = each(LoRALinear, lambda layer, number, moments: layer.begin_())
        return [Event("end of warm start", begin, self.warm_start_steps, restructures=True)]


class LoRALinear(ReparamLinear):
    """y = x W0^T + s drop(x) A^T B^T + bias, with A (rank, in_features), B (out_features, rank).

    `weight` is W0, `lora_A` and `lora_B` the factors; during a warm start there are no factors yet, and `weight` is
    trained. With rounding=compensated, `residue` holds what a bfloat16 `weight` cannot of the folded sum.
    """

    choice = LoRA
    weights: LoRA

    def __init__(self, linear: nn.Linear, weights: LoRA, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.weight = linear.weight
        self.lora_A: nn.Parameter | None
        self.lora_B: nn.Parameter | None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.residue: Tensor | None
        self.register_buffer("residue", None)
        if not weights.warm_start_steps:
            self.begin_()

    def begin_(self) -> None:
        """Freeze W0 and make the factors."""
        weight = self.weight
        self.weight = kept(weight.detach())
        narrow = weight.dtype.itemsize < 4
        if self.weights.rounding == "compensated" and narrow:
            self.residue = torch.zeros_like(weight)
        first, second = self._initial(0)
        self.lora_A = nn.Parameter(first, requires_grad=self.weights.train_a)
        self.lora_B = nn.Parameter(second)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, once they exist."""
        assert self.lora_A is not None and self.lora_B is not None, "no factors during a warm start"
        return self.lora_A, self.lora_B

    @property
    def A(self) -> nn.Parameter:
        """`lora_A`, by the paper's letter."""
        return self.factors[0]

    @property
    def B(self) -> nn.Parameter:
        """`lora_B`, by the paper's letter."""
        return self.factors[1]

    def update_of_weight(self) -> Tensor:
        """s B A in at least float32: what is added to W0."""
        first, second = self.factors
        wide = torch.promote_types(first.dtype, torch.float32)
        return self.weights.scale * (second.to(wide) @ first.to(wide))

    def kept_weight(self) -> Tensor:
        """W0 in at least float32, with what its dtype could not hold."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return weight if self.residue is None else weight + self.residue

    def dense_weight(self) -> Tensor:
        return self.kept_weight() if self.lora_A is None else self.kept_weight() + self.update_of_weight()

    @torch.no_grad()
    def adapter_tensors(self, base: Tensor) -> Mapping[str, Tensor]:
        first, second = self.factors
        if not self.weights.leaves_base:
            wide = self.kept_weight().dtype
            left, values, right = torch.linalg.svd(self.dense_weight() - base.to(wide), full_matrices=False)
            width = 2 * self.weights.rank
            root = (values / self.weights.scale).sqrt()
            spare = max(0, width - len(values))  # a rank above half of the short side
            first = F.pad((root[:, None] * right)[:width], (0, 0, 0, spare))  # type: ignore[assignment]
            second = F.pad((left * root)[:, :width], (0, spare))  # type: ignore[assignment]
        return {"lora_A.default.weight": first.detach(), "lora_B.default.weight": second.detach()}

    def forward(self, x: Tensor) -> Tensor:
        dense = F.linear(x, self._base(x.dtype), self.bias)
        if self.lora_A is None:
            return dense
        first, second = self.factors
        low = self.between(F.linear(F.dropout(x, self.weights.dropout, self.training), first))
        return dense + self.weights.scale * F.linear(low, second)

    def between(self, low: Tensor) -> Tensor:
        """What leaves A on its way to B, (..., rank), in its dtype: as it is, but for layers with something between."""
        return low

    def _base(self, dtype: torch.dtype) -> Tensor:
        """W0 for products in `dtype`: one wide enough for the residue gets it too."""
        return self.weight if self.residue is None or dtype.itemsize < 4 else self.weight + self.residue

    @torch.no_grad()
    def fold_(self, number: int = 1) -> None:
        """W0 <- W0 + s B A; A anew, B = 0."""
        if self.lora_A is None:  # a warm start has nothing to fold
            return
        add_(self.weight, self.update_of_weight(), self.weights.rounding, self.residue, self.origin, number)
        self._renew_factors(number)

    def _renew_factors(self, number: int) -> None:
        first, second = self.factors
        fresh = self._initial(number) if self.weights.init in ("pissa", "olora") else self._random(number)
        first.copy_(fresh[0])
        second.copy_(fresh[1])

    def renewed(self) -> Sequence[nn.Parameter]:
        return () if self.lora_A is None else self.factors

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        if "lora_A" in shapes and self.lora_A is None:
            self.begin_()

    def _initial(self, number: int) -> tuple[Tensor, Tensor]:
        """A and B at the start; pissa and olora take their product out of W0."""
        init, weight = self.weights.init, self.weight
        if init == "zero":
            return weight.new_zeros(self.weights.rank, self.in_features), self._zero()
        if init in ("kaiming", "gaussian") or weight.is_meta:
            return self._random(number)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        rank, scale = self.weights.rank, self.weights.scale
        if init == "pissa":
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
            root = (values[:rank] / scale).sqrt()
            second, first = left[:, :rank] * root, root[:, None] * right[:rank]
        else:
            left, right = torch.linalg.qr(wide)
            second, first = left[:, :rank], right[:rank]
        first, second = first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()
        taken = scale * (second.to(wide.dtype) @ first.to(wide.dtype))  # of the factors as they are stored
        with torch.no_grad():
            add_(weight, -taken, self.weights.rounding, self.residue, self.origin, number)
        return first, second

    def _random(self, number: int) -> tuple[Tensor, Tensor]:
        """A random, B zero."""
        generator = self.origin.generator(f"lora_A {number}")
        shape, like = (self.weights.rank, self.in_features), self.weight
        if self.weights.init == "gaussian":
            return normal(shape, 1 / self.weights.rank, like, generator), self._zero()
        return uniform(shape, 1 / math.sqrt(self.in_features), like, generator), self._zero()

    def _zero(self) -> Tensor:
        return self.weight.new_zeros(self.out_features, self.weights.rank)
