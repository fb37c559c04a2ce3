"""Update rules that keep moments of the gradient elementwise: Adam, Lion, SGD with momentum, RMSprop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_train.kernels.pieces import pieces
from lowrank_train.optim.direction import Dense, Direction, Quotient, RootQuotient, wide
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform, counter, multiply_, tensor_of


def fits_fused(*tensors: Tensor) -> bool:
    """Whether torch's fused kernel takes these: one dtype and layout, on a device that has it."""
    alike = len({(tensor.dtype, tensor.stride()) for tensor in tensors}) == 1
    return alike and tensors[0].device.type in ("cpu", "cuda")


class Elementwise(Transform):
    """A rule whose state tensors are moments that hold one number for each of the parameter's."""

    maskable = True
    elementwise = True

    def mask(self, state: State, keep: Callable[[str, Tensor], Tensor]) -> None:
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.mul_(keep(key, value))


@dataclass
class Adam(Elementwise):
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
    rotation: Literal["squares", "statistical", "uncorrected"] = "squares"  # of the second moment as the basis turns

    def __post_init__(self) -> None:
        check_betas("Adam", self.betas)
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
        step = state["step"] = counter(state, "step") + 1
        exp_avg, exp_avg_sq = tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")
        factor, eps = self.factor_and_eps(step)
        if compressed.dtype in (torch.float32, torch.float64) and fits_fused(compressed, exp_avg, exp_avg_sq):
            quotient = torch.zeros_like(compressed)  # narrower numbers would round it once more than their product does
            self._fused([quotient], [compressed], [state], -1.0, eps)
            return Dense(quotient, factor=factor)
        self.take_in(compressed, state)
        return RootQuotient(exp_avg, exp_avg_sq, eps, factor=factor)

    def take_in(self, compressed: Tensor, state: State) -> None:
        """The moments of `state` with the gradient in them, and nothing else."""
        for narrow, *moments in pieces(compressed, tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")):
            work = torch.promote_types(wide(narrow).dtype, moments[0].dtype)
            gradient, first, second = (tensor.to(work) for tensor in (narrow, *moments))
            first.lerp_(gradient, 1 - self.betas[0])
            second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            for stored, computed in zip(moments, (first, second), strict=True):
                if stored is not computed:  # it is stored narrower
                    stored.copy_(computed)

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        """By torch's fused kernel where all tensors are alike: each number is read once, with no temporary."""
        operands = (param, compressed, tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq"))
        extended = type(self).update is not Adam.update
        if extended or not fits_fused(*operands):
            super().apply(compressed, state, param, rates, decay, grad)
            return
        self.apply_together([compressed], [state], [param], rates, decay)

    def apply_together(
        self,
        compressed: list[Tensor],
        states: list[State],
        params: list[Tensor],
        rates: Rates,
        decay: Tensor | float = 0.0,
    ) -> None:
        """`apply` to tensors that have come to the same step and all fit torch's fused kernel, in one call of it."""
        step = counter(states[0], "step") + 1
        for state in states:
            state["step"] = step
        factor, eps = self.factor_and_eps(step)
        decays = isinstance(decay, Tensor) or decay != 0
        if decays and self.weight_decay_first:
            multiply_(params, 1 - decay)
        self._fused(params, compressed, states, rates.lr * factor, eps)
        if decays and not self.weight_decay_first:
            multiply_(params, 1 - decay)

    def _fused(self, into: list[Tensor], gradients: list[Tensor], states: list[State], by: float, eps: float) -> None:
        """The moments take in the gradients; into -= by * m / (sqrt(v) + eps)."""
        step = counter(states[0], "step")
        correction1, root2 = 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)
        adamw(
            into,
            gradients,
            [tensor_of(state, "exp_avg") for state in states],
            [tensor_of(state, "exp_avg_sq") for state in states],
            [],
            list(torch.full((len(into),), step - 1.0, device=into[0].device).unbind()),  # it counts one up itself
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=by * correction1 / root2,  # it corrects the bias itself, which this undoes
            weight_decay=0.0,
            eps=eps / root2,
            maximize=False,
        )

    def factor_and_eps(self, step: int) -> tuple[float, float]:
        """The bias correction as a factor, and what is added to sqrt(v) so that the factor can be taken out."""
        if not self.correct_bias:
            return 1.0, self.eps
        correction1, root2 = 1 - self.betas[0] ** step, math.sqrt(1 - self.betas[1] ** step)
        return root2 / correction1, self.eps * root2 if self.eps_inside else self.eps

    def rotate(self, state: State, change: Change) -> None:
        """m <- C m; v <- |(C o C) v|, or LDAdam's estimate (arXiv 2410.16103, algorithm 1), which takes v for second
        moments of independent coordinates: v <- c2 |(C o C)(v/c2 - (m/c1)^2) + (C m/c1)^2|, or that without bias
        correction, c1 = c2 = 1 (SubTrack++, arXiv 2502.01586)."""
        exp_avg, exp_avg_sq = tensor_of(state, "exp_avg"), tensor_of(state, "exp_avg_sq")
        step = counter(state, "step")
        if step == 0:
            return
        rotated = change(exp_avg)
        if self.rotation != "squares":
            corrected = self.rotation == "statistical"
            correction1, correction2 = (1 - beta**step if corrected else 1.0 for beta in self.betas)
            variance = exp_avg_sq / correction2 - (exp_avg / correction1).square()
            second = change(variance, squared=True) + (rotated / correction1).square()
            exp_avg_sq.copy_(second.abs_() * correction2)
        else:
            exp_avg_sq.copy_(change(exp_avg_sq, squared=True).abs_())
        exp_avg.copy_(rotated)


@dataclass
class Lion(Elementwise):
    """Lion (Chen et al., arXiv 2302.06675): c = b1 m + (1 - b1) g; direction = sign(c); m <- b2 m + (1 - b2) g.

    signed=False returns c itself, for lifts that take the sign of the full matrix.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    signed: bool = True
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        check_betas("Lion", self.betas)

    def init(self, param: Tensor, slot: Slot) -> State:
        return {"exp_avg": torch.zeros_like(param, dtype=slot.dtype)}

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        beta1, beta2 = self.betas
        exp_avg = tensor_of(state, "exp_avg")
        first = wide(exp_avg)
        gradient = compressed.to(first.dtype)
        blend = torch.lerp(first, gradient, 1 - beta1)
        first.lerp_(gradient, 1 - beta2)
        if first is not exp_avg:
            exp_avg.copy_(first)
        return Dense(blend.sign_() if self.signed else blend)

    def rotate(self, state: State, change: Change) -> None:
        tensor_of(state, "exp_avg").copy_(change(tensor_of(state, "exp_avg")))


@dataclass
class Momentum(Elementwise):
    """SGD with momentum as torch.optim.SGD: b <- momentum b + g; direction = b, or g + momentum b with nesterov.

    Without momentum it keeps no state.
    """

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        check_betas("Momentum", (self.momentum,), "momentum")
        if self.nesterov and not self.momentum:
            raise ValueError("Momentum's nesterov is true, but momentum is 0; set momentum, or nesterov to false")

    def init(self, param: Tensor, slot: Slot) -> State:
        return {"momentum": torch.zeros_like(param, dtype=slot.dtype)} if self.momentum else {}

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        if not self.momentum:
            return Dense(compressed)
        stored = tensor_of(state, "momentum")
        buffer = wide(stored).mul_(self.momentum).add_(compressed)
        if buffer is not stored:  # it is stored narrower
            stored.copy_(buffer)
        return Dense(buffer.mul(self.momentum).add_(compressed) if self.nesterov else buffer)

    def rotate(self, state: State, change: Change) -> None:
        if self.momentum:
            tensor_of(state, "momentum").copy_(change(tensor_of(state, "momentum")))


@dataclass
class RmsProp(Elementwise):
    """RMSprop: v <- b v + (1 - b) g^2; d = g / (sqrt(v) + eps), with momentum b <- momentum b + d; torch's form."""

    beta: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay_first: bool = True

    def __post_init__(self) -> None:
        check_betas("RmsProp", (self.beta,), "beta")
        check_betas("RmsProp", (self.momentum,), "momentum")
        if self.eps <= 0:
            raise ValueError(f"RmsProp's eps is {self.eps}; it must be above 0")

    def init(self, param: Tensor, slot: Slot) -> State:
        state: State = {"square_avg": torch.zeros_like(param, dtype=slot.dtype)}
        if self.momentum:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=slot.dtype)
        return state

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        stored = tensor_of(state, "square_avg")
        square_avg = wide(stored)
        gradient = compressed.to(square_avg.dtype)
        square_avg.mul_(self.beta).addcmul_(gradient, gradient, value=1 - self.beta)
        if square_avg is not stored:  # it is stored narrower
            stored.copy_(square_avg)
        denominator = square_avg.sqrt().add_(self.eps)
        if not self.momentum:
            return Quotient(gradient, denominator)
        stored = tensor_of(state, "momentum_buffer")
        buffer = wide(stored).mul_(self.momentum).addcdiv_(gradient, denominator)
        if buffer is not stored:
            stored.copy_(buffer)
        return Dense(buffer)

    def rotate(self, state: State, change: Change) -> None:
        """As Adam: v <- |(C o C) v|, and the buffer with C."""
        square_avg = tensor_of(state, "square_avg")
        square_avg.copy_(change(square_avg, squared=True).abs_())
        if self.momentum:
            tensor_of(state, "momentum_buffer").copy_(change(tensor_of(state, "momentum_buffer")))


def check_betas(rule: str, betas: tuple[float, ...], name: str = "betas") -> None:
    """ValueError where a decay rate does not lie in [0, 1)."""
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            place = f"{name}[{index}]" if len(betas) > 1 else name
            raise ValueError(f"{rule}'s {place} is {beta}; it must lie in [0, 1)")
