"""LoRA that begins with what the data shows: LoRA-GA with the first gradient, EVA with what enters the layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_train.nn.events import Event, each
from lowrank_train.nn.lora import LoRA, LoRALinear
from lowrank_train.nn.lora_sb import Watched
from lowrank_train.nn.reparam import Origin, ReparamLinear, normal, sum_over_ranks_
from lowrank_train.nn.rounding import add_

POWER_ITERATIONS = 4  # for the leading vectors of a gradient, of 4 ranks' width: PEFT's choice
SPARE_VECTORS = 10  # beyond twice the rank, for the leading directions of the inputs


@dataclass
class LoRAFromData(LoRA):
    """LoRA whose A and B are 0, and so untrained, for `watched_updates`, and then begin with what was seen in them."""

    watched_updates: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watched_updates < 1:
            raise ValueError(f"strategy.weights.watched_updates is {self.watched_updates}; it must be at least 1")
        if self.init != "kaiming":
            raise ValueError(f"strategy.weights.init is {self.init}, but {type(self).__name__} has a start of its own")
        if self.warm_start_steps:
            raise ValueError(
                f"strategy.weights.warm_start_steps is {self.warm_start_steps}, but {type(self).__name__} begins with "
                "what the first updates show; it must be 0"
            )

    @abstractmethod
    def watcher(self, layer: LoRAFromDataLinear) -> Watcher:
        """What looks at the data for a layer."""

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LoRAFromDataLinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        begin = each(LoRAFromDataLinear, lambda layer, number, moments: layer.start_(moments.forget))
        return [Event("start from the data", begin, self.watched_updates)]


@dataclass
class LoRAGA(LoRAFromData):
    """B A along the first gradient G = U S V^T (Wang et al., LoRA-GA, arXiv 2407.05000, theorems 3.1 and 3.2).

    A = c V_(1..r)^T,  B = c U_(r+1..2r),  c = m^(1/4) / sqrt(gamma), m rows of W0;  W0 <- W0 - s B A, so that the layer
    goes on as it was. G is summed over the micro-batches of the updates that are watched. PEFT also multiplies B by the
    singular values, which makes the start depend on the scale of the loss; the paper and its code do not.
    """

    gamma: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise ValueError(f"strategy.weights.gamma is {self.gamma}; it must be above 0")

    @property
    def leaves_base(self) -> bool:
        return False

    def misfit(self, shape: tuple[int, int]) -> str | None:
        if 2 * self.rank > min(shape):
            return f"strategy.weights.rank is {self.rank}, above half of the short side of {shape[0]} x {shape[1]}"
        return None

    def watcher(self, layer: LoRAFromDataLinear) -> Watcher:
        return GradientSum(layer)


@dataclass
class EVA(LoRAFromData):
    """A holds the leading principal directions of the layer's inputs, B = 0 (Paischer et al., EVA, arXiv 2410.07170).

    The principal directions are of the inputs about their mean, as published. They come from a sketch of the covariance
    of 2 r + 10 columns (Nystroem's approximation with a shift, Tropp et al., arXiv 1706.05736), which is linear in it,
    so that micro-batches and devices add up. Every position of a row counts, padding too. All layers have the same rank
    (the paper's rho = 1).
    """

    def watcher(self, layer: LoRAFromDataLinear) -> Watcher:
        return InputSketch(layer)


class Watcher(nn.Module):
    """What a layer sees while it is watched: sums that devices may add up, in buffers."""

    @abstractmethod
    def watch(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` as it is, with what is learnt from it and from the layer's input `x` noted, now or in backward."""

    @abstractmethod
    def factors(self, layer: LoRAFromDataLinear) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank) to begin with."""


class LoRAFromDataLinear(LoRALinear):
    """A LoRALinear with a `watcher` until A and B have begun; the tensors of both are in a checkpoint."""

    choice = LoRAGA
    weights: LoRAFromData

    def __init__(self, linear: nn.Linear, weights: LoRAFromData, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.watcher: Watcher | None = weights.watcher(self)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.watcher is None or not self.training else self.watcher.watch(y, x)

    @torch.no_grad()
    def start_(self, forget: Callable[[nn.Parameter], None]) -> None:
        """Put what was seen into A and B, take their product out of W0, and drop the watcher."""
        assert self.watcher is not None, "A and B have begun already"
        for total in self.watcher.buffers():
            sum_over_ranks_(total)
        first, second = (part.to(self.weight.dtype) for part in self.watcher.factors(self))
        self.A.copy_(first)
        self.B.copy_(second)
        if not self.weights.leaves_base:
            add_(self.weight, -self.update_of_weight(), self.weights.rounding, self.residue, self.origin, 0)
        for param in self.factors:
            forget(param)
        self.watcher = None

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        watched = any(name.startswith("watcher.") for name in shapes)
        if shapes and watched != (self.watcher is not None):
            self.watcher = self.weights.watcher(self) if watched else None

    def _initial(self, number: int) -> tuple[Tensor, Tensor]:
        return self.weight.new_zeros(self.weights.rank, self.in_features), self._zero()


class GradientSum(Watcher):
    """`total`, (out_features, in_features): the gradient of W0, added up."""

    def __init__(self, layer: LoRAFromDataLinear) -> None:
        super().__init__()
        self.total: Tensor
        self.register_buffer("total", torch.zeros_like(layer.weight))

    def watch(self, y: Tensor, x: Tensor) -> Tensor:
        watched: Tensor = Watched.apply(y, x, self.total)
        return watched

    def factors(self, layer: LoRAFromDataLinear) -> tuple[Tensor, Tensor]:
        weights = layer.weights
        assert isinstance(weights, LoRAGA)
        rank, gradient = weights.rank, self.total.to(torch.promote_types(self.total.dtype, torch.float32))
        width = min(4 * rank, *gradient.shape)
        if width < min(gradient.shape):
            start = normal((gradient.shape[1], width), 1.0, gradient, layer.origin.generator("gradient"))
            basis = torch.linalg.qr(gradient @ start).Q
            for _ in range(POWER_ITERATIONS):
                basis = torch.linalg.qr(gradient @ torch.linalg.qr(gradient.T @ basis).Q).Q
            small, _, right = torch.linalg.svd(basis.T @ gradient, full_matrices=False)
            left = basis @ small
        else:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        scale = layer.out_features**0.25 / weights.gamma**0.5
        return scale * right[:rank], scale * left[:, rank : 2 * rank]


class InputSketch(Watcher):
    """Of the inputs x: `sketch` = sum x (x^T T) (in_features, width) with an orthonormal T, their sum, their number."""

    def __init__(self, layer: LoRAFromDataLinear) -> None:
        super().__init__()
        like = torch.empty(0, dtype=torch.promote_types(layer.weight.dtype, torch.float32), device=layer.weight.device)
        self._test: Tensor | None = None
        self._origin = layer.origin
        self._width = min(layer.in_features, 2 * layer.weights.rank + SPARE_VECTORS)
        self.sketch: Tensor
        self.sum: Tensor
        self.count: Tensor
        self.register_buffer("sketch", like.new_zeros(layer.in_features, self._width))
        self.register_buffer("sum", like.new_zeros(layer.in_features))
        self.register_buffer("count", like.new_zeros((), dtype=torch.float64))

    @property
    def test(self) -> Tensor:
        """T, the same in every process; drawn anew where a run goes on."""
        if self._test is None:
            drawn = normal(tuple(self.sketch.shape), 1.0, self.sketch, self._origin.generator("test matrix"))
            self._test = torch.linalg.qr(drawn).Q
        return self._test

    @torch.no_grad()
    def watch(self, y: Tensor, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.sketch.dtype)
        self.sketch.addmm_(rows.T, rows @ self.test)
        self.sum += rows.sum(0)
        self.count += len(rows)
        return y

    def factors(self, layer: LoRAFromDataLinear) -> tuple[Tensor, Tensor]:
        test, mean = self.test.double(), (self.sum / self.count).double()
        sketch = self.sketch.double() - self.count * torch.outer(mean, mean @ test)  # of the inputs about their mean
        # The rounding of the sums, which are in float32, could make a tiny eigenvalue negative.
        shift = torch.finfo(self.sketch.dtype).eps * torch.linalg.matrix_norm(sketch)
        sketch = sketch + (shift + torch.finfo(torch.float64).tiny) * test
        values, vectors = torch.linalg.eigh((test.T @ sketch + sketch.T @ test) / 2)
        root = sketch @ (vectors * values.clamp(min=shift).rsqrt())
        directions = torch.linalg.svd(root, full_matrices=False).U[:, : layer.weights.rank]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return (directions * largest.sign()).T, layer._zero()
