"""Muon and AuON: rules for whole matrices that turn a momentum into an update of a fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.optim.direction import Dense, Direction, wide
from lowrank_train.optim.moments import check_betas
from lowrank_train.optim.orthogonalize import newton_schulz
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform, tensor_of


@dataclass
class MatrixMomentum(Transform):
    """m <- b m + (1 - b) G;  u = m, or (1 - b) G + b m with nesterov: what Muon and AuON work on.

    Only for matrices (M, N), whole ones or the small gradients of a subspace, which keep M N numbers.
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        check_betas(type(self).__name__, (self.momentum,), "momentum")

    def misfit(self, shape: Size) -> str | None:
        if len(shape) == 2:
            return None
        return f"{type(self).__name__} works on matrices alone; leave it to strategy.rest, or choose another rule there"

    def init(self, param: Tensor, slot: Slot) -> State:
        fault = self.misfit(param.shape)
        if fault is not None:
            raise ValueError(f"{slot.name} of shape {tuple(param.shape)}: {fault}")
        return {"momentum": torch.zeros_like(param, dtype=slot.dtype)}

    def averaged(self, compressed: Tensor, state: State) -> Tensor:
        """Takes the gradient into the momentum; u in float32 or wider. May be the state itself."""
        stored = tensor_of(state, "momentum")
        momentum = wide(stored)
        gradient = compressed.to(momentum.dtype)
        momentum.lerp_(gradient, 1 - self.momentum)
        if momentum is not stored:  # it is stored narrower
            stored.copy_(momentum)
        return gradient.lerp(momentum, self.momentum) if self.nesterov else momentum

    def rotate(self, state: State, change: Change) -> None:
        tensor_of(state, "momentum").copy_(change(tensor_of(state, "momentum")))


@dataclass
class Muon(MatrixMomentum):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): the momentum, nearly orthogonalised.

    direction = adjust * NS(u), where NS brings the singular values of u (M, N) to about 0.7 to 1.2 by `steps`
    Newton-Schulz iterations. adjust_lr has the names of torch.optim.Muon: `original` is sqrt(max(1, M / N)), made for
    an lr of about 0.02; `match_rms_adamw` is 0.2 sqrt(max(M, N)) (Liu et al., arXiv 2502.16982), so that an update is
    as large as one of AdamW and takes AdamW's lr; `none` is 1. In a subspace M and N are those of the small gradient.
    """

    steps: int = 5
    adjust_lr: Literal["original", "match_rms_adamw", "none"] = "match_rms_adamw"
    precision: Literal["bfloat16", "wide"] = "bfloat16"  # of the iteration; wide: float32, or as the weights if wider

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"Muon's steps is {self.steps}; it must be at least 1")

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        orthogonal = newton_schulz(self.averaged(compressed, state), self.steps, dtype)
        return Dense(orthogonal, factor=self.adjustment(compressed.shape))

    def adjustment(self, shape: Size | tuple[int, ...]) -> float:
        """What the update is multiplied by."""
        rows, columns = shape
        if self.adjust_lr == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns)) if self.adjust_lr == "match_rms_adamw" else 1.0


@dataclass
class Auon(MatrixMomentum):
    """AuON (arXiv 2509.24320): the momentum, held back by the mean square of a hyperbolic cosine.

    v = u / (||u||_F + 1e-7);  r = sqrt(mean cosh^2(gamma v)), over all M N entries
    form=code:  direction = u / (r + 1e-8), gamma 1.5 in the published code
    form=paper: direction = sqrt(max(1, M / N)) v / (r + 1e-8), gamma 1 in the paper
    r is 1 + gamma^2 / (2 M N) to first order, 1.0003 for 64 x 64: `code` is SGD with Nesterov's momentum in all but
    name, and `paper` is that with its norm made 1.
    """

    gamma: float = 1.5
    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise ValueError(f"Auon's gamma is {self.gamma}; it must be above 0")

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        averaged = self.averaged(compressed, state)
        unit = averaged / (torch.linalg.vector_norm(averaged) + 1e-7)
        brake = (unit * self.gamma).cosh_().square_().mean().sqrt() + 1e-8
        if self.form == "code":
            return Dense(averaged / brake)
        rows, columns = compressed.shape
        return Dense(unit.div_(brake), factor=math.sqrt(max(1.0, rows / columns)))
