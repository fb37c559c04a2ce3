"""Update rules that keep moments of the gradient elementwise: Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.optim.direction import Dense, Direction, Quotient, wide
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform, counter, tensor_of


@dataclass
class Adam(Transform):
    """Adam (Kingma and Ba, arXiv 1412.6980), with both conventions for eps.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  c1 = 1 - b1^t, c2 = 1 - b2^t
    eps_inside=False: direction = sqrt(c2)/c1 * m / (sqrt(v) + eps), as transformers' AdamW and the GaLore family;
        the effective eps is eps/sqrt(c2), 31.6 times larger at t = 1 with b2 = 0.999.
    eps_inside=True: direction = (m/c1) / (sqrt(v/c2) + eps), as torch.optim.AdamW.
    Moments are stored in the slot's dtype; the arithmetic is at least float32.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_inside: bool = True
    weight_decay_first: bool = True
    correct_bias: bool = True
    rotation: Literal["squares", "statistical"] = "squares"  # how the second moment follows a rotation of the basis

    def __post_init__(self) -> None:
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"Adam's {name} is {beta}; it must lie in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"Adam's eps is {self.eps}; it must be above 0")

    def init(self, param: Tensor, slot: Slot) -> State:
        return {
            "step": 0,
            "exp_avg": torch.zeros_like(param, dtype=slot.dtype),
            "exp_avg_sq": torch.zeros_like(param, dtype=slot.dtype),
        }

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        beta1, beta2 = self.betas
        step = state["step"] = counter(state, "step") + 1
        exp_avg, exp_avg_sq = tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")
        math_dtype = torch.promote_types(exp_avg.dtype, torch.float32)
        gradient = compressed.to(math_dtype)
        first, second = exp_avg.to(math_dtype), exp_avg_sq.to(math_dtype)  # the same tensors unless stored narrower
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if first is not exp_avg:
            exp_avg.copy_(first)
            exp_avg_sq.copy_(second)
        correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if self.correct_bias else (1.0, 1.0)
        denominator = second.sqrt()
        if self.eps_inside:
            denominator.add_(self.eps * math.sqrt(correction2))  # the same quotient with sqrt(c2) taken out
        else:
            denominator.add_(self.eps)
        return Quotient(first, denominator, factor=math.sqrt(correction2) / correction1)

    def rotate(self, state: State, change: Change) -> None:
        """m <- C m; v <- |(C o C) v|, or LDAdam's estimate (arXiv 2410.16103, algorithm 1), which takes v for second
        moments of independent coordinates: v <- c2 |(C o C)(v/c2 - (m/c1)^2) + (C m/c1)^2|."""
        exp_avg, exp_avg_sq = tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")
        step = counter(state, "step")
        if step == 0:
            return
        rotated = change(exp_avg)
        if self.rotation == "statistical":
            correction1, correction2 = 1 - self.betas[0] ** step, 1 - self.betas[1] ** step
            variance = exp_avg_sq / correction2 - (exp_avg / correction1).square()
            second = change(variance, squared=True) + (rotated / correction1).square()
            exp_avg_sq.copy_(second.abs_() * correction2)
        else:
            exp_avg_sq.copy_(change(exp_avg_sq, squared=True).abs_())
        exp_avg.copy_(rotated)


@dataclass
class Lion(Transform):
    """Lion (Chen et al., arXiv 2302.06675): c = b1 m + (1 - b1) g; direction = sign(c); m <- b2 m + (1 - b2) g.

    signed=False returns c itself, for lifts that take the sign of the full matrix.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    signed: bool = True
    weight_decay_first: bool = True

    def init(self, param: Tensor, slot: Slot) -> State:
        return {"exp_avg": torch.zeros_like(param, dtype=slot.dtype)}

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        beta1, beta2 = self.betas
        exp_avg = tensor_of(state, "exp_avg")
        first, gradient = wide(exp_avg), wide(compressed)
        blend = torch.lerp(first, gradient, 1 - beta1)
        first.lerp_(gradient, 1 - beta2)
        if first is not exp_avg:
            exp_avg.copy_(first)
        return Dense(blend.sign_() if self.signed else blend)

    def rotate(self, state: State, change: Change) -> None:
        tensor_of(state, "exp_avg").copy_(change(tensor_of(state, "exp_avg")))


@dataclass
class Momentum(Transform):
    """SGD with momentum: m <- momentum m + g; direction = m. Without momentum it keeps no state."""

    momentum: float = 0.9
    weight_decay_first: bool = True

    def init(self, param: Tensor, slot: Slot) -> State:
        return {"momentum": torch.zeros_like(param, dtype=slot.dtype)} if self.momentum else {}

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        if not self.momentum:
            return Dense(compressed)
        stored = tensor_of(state, "momentum")
        averaged = wide(stored).mul_(self.momentum).add_(compressed)
        if averaged is not stored:
            stored.copy_(averaged)
        return Dense(averaged)

    def rotate(self, state: State, change: Change) -> None:
        if self.momentum:
            tensor_of(state, "momentum").copy_(change(tensor_of(state, "momentum")))


@dataclass
class Adafactor(Transform):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235) as in transformers: factored second moment, clipped update.

    b2 = 1 - t^decay_rate; q = g^2 + eps; row and column means of q, averaged with b2; u = g / sqrt(row col / mean row);
    u <- u / max(1, RMS(u) / clip_threshold). With beta1 the average runs over lr-scaled updates, as published.
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = False  # times max(eps[1], RMS of the weights)
    weight_decay_first: bool = True

    def init(self, param: Tensor, slot: Slot) -> State:
        like = torch.zeros_like(param, dtype=slot.dtype)
        state: State = {"step": 0}
        if param.ndim >= 2:
            state |= {"exp_avg_sq_row": like.new_zeros(param.shape[:-1])}
            state |= {"exp_avg_sq_col": like.new_zeros(param.shape[:-2] + param.shape[-1:])}
        else:
            state["exp_avg_sq"] = like
        if self.beta1 is not None:
            state["exp_avg"] = torch.zeros_like(param, dtype=slot.dtype)
        return state

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        step = state["step"] = counter(state, "step") + 1
        beta2 = 1.0 - step**self.decay_rate
        gradient = wide(compressed)
        squared = gradient.square().add_(self.eps[0])
        if gradient.ndim >= 2:
            row, column = tensor_of(state, "exp_avg_sq_row"), tensor_of(state, "exp_avg_sq_col")
            row.mul_(beta2).add_(squared.mean(-1), alpha=1 - beta2)
            column.mul_(beta2).add_(squared.mean(-2), alpha=1 - beta2)
            wide_row = wide(row)
            scale = (wide_row / wide_row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
            update = scale * wide(column).unsqueeze(-2).rsqrt() * gradient
        else:
            second = tensor_of(state, "exp_avg_sq")
            second.mul_(beta2).add_(squared, alpha=1 - beta2)
            update = wide(second).rsqrt() * gradient
        update.div_((rms(update) / self.clip_threshold).clamp_min(1.0))
        update.mul_(self.decay_scale(param))
        if self.beta1 is None:
            return Dense(update)
        exp_avg = tensor_of(state, "exp_avg")
        exp_avg.mul_(self.beta1).add_(update, alpha=(1 - self.beta1) * rates.lr)
        return Dense(wide(exp_avg), factor=1 / rates.lr if rates.lr else 0.0)

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return rms(wide(param)).clamp_min(self.eps[1]) if self.scale_parameter else 1.0


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square, 0-dimensional."""
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())


@dataclass
class RmsProp(Transform):
    """RMSprop: v <- b v + (1 - b) g^2; d = g / (sqrt(v) + eps), with momentum b <- momentum b + d; torch's form."""

    beta: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay_first: bool = True

    def init(self, param: Tensor, slot: Slot) -> State:
        state: State = {"square_avg": torch.zeros_like(param, dtype=slot.dtype)}
        if self.momentum:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=slot.dtype)
        return state

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        square_avg, gradient = tensor_of(state, "square_avg"), wide(compressed)
        square_avg.mul_(self.beta).addcmul_(gradient, gradient, value=1 - self.beta)
        denominator = wide(square_avg).sqrt().add_(self.eps)
        if not self.momentum:
            return Quotient(gradient, denominator)
        buffer = tensor_of(state, "momentum_buffer")
        buffer.mul_(self.momentum).add_(gradient / denominator)
        return Dense(wide(buffer))
