"""Update rules that keep moments of the gradient elementwise: Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.optim.transform import Direction, Quotient, Slot, State, Transform, counter, tensor_of


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

    def update(self, compressed: Tensor, state: State, param: Tensor, grad: Tensor | None = None) -> Direction:
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
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominator = second.sqrt()
        if self.eps_inside:
            denominator.add_(self.eps * math.sqrt(correction2))  # the same quotient with sqrt(c2) taken out
        else:
            denominator.add_(self.eps)
        return Quotient(first, denominator, math.sqrt(correction2) / correction1)
