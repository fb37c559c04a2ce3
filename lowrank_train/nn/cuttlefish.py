"""Cuttlefish: dense layers that are watched, and turned into factors once their stable ranks have settled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.nn.events import Event, Moments
from lowrank_train.nn.reparam import Origin, ReparamLinear, Weights

SMOOTHING = 2 / (15 + 1)  # weight of the newest value in the moving average, of 15 evaluations
BLOCK, ROUNDS = 4, 20  # vectors and rounds of the Krylov space for the largest singular value


@dataclass
class Cuttlefish(Weights):
    """W is trained dense while its stable rank |W|_F^2 / sigma_max^2 moves, then as W = B A (arXiv 2305.02538).

    A layer has settled when the moving average of its stable ranks changed by at most `threshold` an evaluation, in the
    mean of the last `window`. When all have, each gets a rank r of its own, and B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T;
    those for which r (m + n) >= m n stay dense.
    """

    evaluate_every: int = 100  # updates between two evaluations; an epoch in the paper
    latest_steps: int = 5000  # updates after which the factors come at the latest
    earliest_evaluation: int = 15
    window: int = 11  # evaluations
    threshold: float = 0.1
    # the rank is ceil(stable rank now * k / stable rank before training), k = min(m, n); false: ceil(stable rank now)
    scaled: bool = True
    frobenius_decay: float = 0.0  # lambda of (lambda / 2) |B A|_F^2, decoupled; in place of optim.weight_decay

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "earliest_evaluation", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.weights.{name} is {getattr(self, name)}; it must be at least 1")
        if self.latest_steps < self.evaluate_every:
            raise ValueError(
                f"strategy.weights.latest_steps is {self.latest_steps}; it must be at least "
                f"strategy.weights.evaluate_every={self.evaluate_every}, or there is no stable rank to go by"
            )
        for name in ("threshold", "frobenius_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"strategy.weights.{name} is {getattr(self, name)}; it must be at least 0")

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return CuttlefishLinear(linear, self, origin)

    @property
    def evaluations(self) -> int:
        """How many there are at most."""
        return self.latest_steps // self.evaluate_every

    def has_settled(self, stable_ranks: Sequence[float]) -> bool:
        """Whether a layer with these stable ranks, one an evaluation, has settled."""
        if len(stable_ranks) < self.earliest_evaluation:
            return False
        average, changes = stable_ranks[0], []
        for value in stable_ranks[1:]:
            change = SMOOTHING * (value - average)
            average += change
            changes.append(abs(change))
        return len(changes) >= self.window and sum(changes[-self.window :]) / self.window <= self.threshold

    def events(self) -> Sequence[Event]:
        def decay(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
            for layer in _ours(layers):
                if layer.A is not None:
                    layer.decay_(moments.lr(layer.A) * self.frobenius_decay)

        def evaluate(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> str | None:
            ours = _ours(layers)
            if number > self.evaluations or any(bool(layer.switched) for layer in ours):
                return None
            for layer in ours:
                layer.evaluate_(number)
            return switch(1, layers, moments) if all(self.has_settled(layer.recorded()) for layer in ours) else None

        def switch(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> str | None:
            dense = [layer for layer in _ours(layers) if not layer.switched]
            for layer in dense:
                layer.switch_()
            return "switch to factors" if dense else None

        events = [
            Event("stable ranks", evaluate, self.evaluate_every, self.evaluate_every, quiet=True, restructures=True),
            Event("switch at the latest", switch, self.latest_steps, quiet=True, restructures=True),
        ]
        if self.frobenius_decay:  # before a switch, whose factors have not been updated yet
            events.insert(0, Event("Frobenius decay", decay, 1, 1, quiet=True))
        return events


class CuttlefishLinear(ReparamLinear):
    """y = x W^T + bias with `weight` (out, in), later y = (x A^T) B^T + bias with A (rank, in), B (out, rank).

    `stable_ranks` holds one number an evaluation, zero for those to come, `initial_stable_rank` the one before
    training, `switched` whether the choice between the two forms has been made.
    """

    choice = Cuttlefish
    weights: Cuttlefish

    def __init__(self, linear: nn.Linear, weights: Cuttlefish, origin: Origin) -> None:
        super().__init__(linear, weights, origin)
        self.weight: nn.Parameter | None
        assert isinstance(linear.weight, nn.Parameter)
        self.register_parameter("weight", linear.weight)
        self.A: nn.Parameter | None
        self.B: nn.Parameter | None
        self.register_parameter("A", None)
        self.register_parameter("B", None)
        device = linear.weight.device
        self.stable_ranks: Tensor
        self.initial_stable_rank: Tensor
        self.switched: Tensor
        self.register_buffer("stable_ranks", torch.zeros(weights.evaluations, device=device))
        self.register_buffer("initial_stable_rank", torch.zeros((), device=device))
        self.register_buffer("switched", torch.zeros((), dtype=torch.bool, device=device))
        if not linear.weight.is_meta:
            self.initial_stable_rank.fill_(self._measure())

    def _measure(self) -> float:
        """The stable rank now. Every evaluation begins with the same vectors, so that its error does not jump about."""
        assert self.weight is not None
        return stable_rank(self.weight, self.origin.generator("stable rank"))

    def evaluate_(self, number: int) -> None:
        """Record the stable rank of evaluation `number`, counted from 1."""
        self.stable_ranks[number - 1] = self._measure()

    def recorded(self) -> list[float]:
        """The stable ranks so far."""
        return [value for value in self.stable_ranks.tolist() if value > 0]

    def rank(self) -> int:
        """The rank that the last evaluation asks for."""
        most = min(self.in_features, self.out_features)
        factor = most / float(self.initial_stable_rank) if self.weights.scaled else 1.0
        return max(1, min(most, math.ceil(self.recorded()[-1] * factor)))

    @torch.no_grad()
    def switch_(self) -> None:
        """Take the form of two factors, where they are smaller than W."""
        assert self.weight is not None
        self.switched.fill_(True)
        rank = self.rank()
        if rank * (self.in_features + self.out_features) >= self.in_features * self.out_features:
            return
        weight = self.weight
        left, values, right = torch.linalg.svd(self.dense_weight(), full_matrices=False)
        root = values[:rank].sqrt()
        self.A = nn.Parameter((root[:, None] * right[:rank]).to(weight.dtype).contiguous())
        self.B = nn.Parameter((left[:, :rank] * root).to(weight.dtype).contiguous())
        self.weight = None

    @torch.no_grad()
    def decay_(self, share: float) -> None:
        """A <- A - share B^T B A, B <- B - share B A A^T, the gradients of |B A|_F^2 / 2, both from the old factors."""
        first, second = self._factors()
        of_first, of_second = (second.T @ second) @ first, second @ (first @ first.T)
        assert self.A is not None and self.B is not None
        self.A.copy_(first - share * of_first)
        self.B.copy_(second - share * of_second)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B in at least float32."""
        assert self.A is not None and self.B is not None
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.A.to(wide), self.B.to(wide)

    def dense_weight(self) -> Tensor:
        if self.weight is not None:
            return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        first, second = self._factors()
        return second @ first

    def forward(self, x: Tensor) -> Tensor:
        if self.A is None or self.B is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        return F.linear(F.linear(x, self.A), self.B, self.bias)

    def take_form_(self, shapes: Mapping[str, torch.Size]) -> None:
        if "A" in shapes and self.weight is not None:
            self.A = nn.Parameter(self.weight.new_zeros(shapes["A"]))
            self.B = nn.Parameter(self.weight.new_zeros(shapes["B"]))
            self.weight = None


def _ours(layers: Mapping[str, ReparamLinear]) -> list[CuttlefishLinear]:
    return [layer for layer in layers.values() if isinstance(layer, CuttlefishLinear)]


def stable_rank(weight: Tensor, generator: torch.Generator) -> float:
    """|W|_F^2 / sigma_max^2 of W (m, n), at least 1; sigma_max from the block Krylov space of W^T W.

    The space is exact where it is as large as the short side (84); a 1024 x 1024 matrix of noise, whose spectrum is the
    flattest there is, comes out right to 1e-4.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    start = torch.randn(wide.shape[1], min(BLOCK, *wide.shape), generator=generator, device="cpu")
    blocks = [torch.linalg.qr(start.to(wide)).Q]
    for _ in range(ROUNDS):
        blocks.append(torch.linalg.qr(wide.T @ (wide @ blocks[-1])).Q)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    largest = float(torch.linalg.matrix_norm(wide @ basis, ord=2))
    return max(1.0, float(wide.square().sum()) / largest**2) if largest > 0 else 1.0
