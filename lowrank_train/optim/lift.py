"""How a small update returns to the full matrix, and what becomes of what the subspace left out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.kernels.norms import norms_along
from lowrank_train.optim.direction import Dense, Direction, LineScaled, Sum, wide
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Slot, State, tensor_of

EPS = 1e-8  # Fira's and APOLLO's code: against division by the norm of an empty line
GROWTH = 1.01  # Fira, section 4.3: the residual's norm may grow by at most 1 % an update


class Lift(ABC):
    """From the direction in the subspace to the direction of the matrix."""

    needs_gradient: bool = False  # uses what the subspace left out, so the full gradient must be there
    needs_projection: bool = False  # takes G - up(down(G)) for what was left out, so up(down(.)) must be a projection
    needs_lines: bool = False  # scales line by line, so one side must stay uncompressed
    takes_sign: bool = False  # of the whole matrix, so the inner rule need not
    row_wise: bool = False  # treats rows apart, where the subspace compresses the columns
    comes_first: bool = False  # before the inner rule, which then works on whole matrices

    def init(self, param: Tensor, slot: Slot) -> State:
        """State of the lift's own."""
        return {}

    @abstractmethod
    def lift(
        self,
        low_update: Direction,  # of the compressed shape
        low_grad: Tensor,
        grad: Tensor | None,  # (M, N), None unless needs_gradient; may be overwritten
        subspace: Subspace,
        state: State,
        param: Tensor,  # (M, N)
    ) -> Direction:
        """The direction of the full matrix, before -lr."""


@dataclass
class Backproject(Lift):
    """scale * up(u): GaLore's lift (arXiv 2403.03507, algorithm 1, where scale is alpha)."""

    scale: float = 0.25

    row_wise = True

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        return subspace.up(low_update.raw(), state, param.shape).scaled(self.scale * low_update.factor)


@dataclass
class StateFreeResidual(Lift):
    """scale * (up(u) + residual_scale * rule(E)), E = G - up(low): FRUGAL's lift (arXiv 2411.07837).

    The rule is the sign of what the subspace left out, or what it left out as it is. Where the subspace is the whole
    space there is no residual, and rounding errors of one would be taken for it: the sign is left away then.
    """

    scale: float = 1.0  # FRUGAL's proj_params_lr_scale
    residual: Literal["sign", "sgd"] = "sign"
    residual_scale: float = 1.0  # FRUGAL's inactive_lr_scale

    row_wise = True

    def __post_init__(self) -> None:
        self.needs_gradient = self.needs_projection = True

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        assert grad is not None
        inside = subspace.up(low_update.raw(), state, param.shape).scaled(low_update.factor)
        if low_grad.numel() == grad.numel():
            return inside.scaled(self.scale)
        residual = subspace.subtract_(grad, low_grad, state)
        if self.residual == "sign":
            residual.sign_()
        return Sum(inside, Dense(residual, factor=self.residual_scale), factor=self.scale)


@dataclass
class ScaledResidual(Lift):
    """Fira (arXiv 2410.01623): the residual scaled line by line as the subspace scaled its own part, and limited.

    phi = ||N|| / (||R|| + 1e-8) along each line that is not compressed;  E = G - residual_overlap * up(R);
    S = phi * E, whose norm may grow by 1 % an update;  direction = factor * (scale * up(N) + S)
    N is the inner direction before bias correction, which is the factor. The published code has residual_overlap =
    scale, so that with scale below 1 a part of the gradient inside the subspace counts as residual; the paper's formula
    is residual_overlap = 1, with S times scale as well.

    The norm of S follows from the norms of the lines of G and R, and up(R) joins the back-projection of N, so that
    the gradient is read twice and no full-size temporary is made; published code makes two.
    """

    scale: float = 0.25
    form: Literal["code", "paper"] = "code"
    residual_norm: Literal["lines", "whole"] = "lines"  # whole: of the residual itself, formed once more

    def __post_init__(self) -> None:
        self.needs_gradient = self.needs_lines = True
        self.needs_projection = self.form == "paper"

    def init(self, param: Tensor, slot: Slot) -> State:
        return limiter_state(param)

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        assert grad is not None
        inside, line = self.joined(low_update.raw(), low_grad, grad, subspace, state, param)
        back = subspace.up(inside.to(low_grad.dtype), state, param.shape)
        return Sum(back, LineScaled(grad, line.to(grad.dtype)), factor=low_update.factor)

    def joined(
        self, low_update: Tensor, low_grad: Tensor, grad: Tensor, subspace: Subspace, state: State, param: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is projected back, of the compressed shape, and the factor of each line of the gradient beside it."""
        axis = line_axis(subspace, state, param)
        raw, low = wide(low_update), wide(low_grad)
        phi = norms_along(raw, axis, keepdim=True)
        low_norm = norms_along(low, axis, keepdim=True)
        phi = phi / (low_norm + EPS)
        overlap = self.scale if self.form == "code" else 1.0
        if subspace.orthonormal and self.residual_norm == "lines":
            grad_norm = norms_along(grad, axis, keepdim=True)
            lines = torch.addcmul(grad_norm.square(), low_norm, low_norm, value=overlap**2 - 2 * overlap).clamp_min_(0)
            squared = lines.mul_(phi).mul_(phi).sum()
        else:
            residual = subspace.subtract_(grad.clone(), low_grad, state, overlap)
            squared = (wide(residual) * phi).square().sum()
        limit = limiter(state, squared.sqrt())
        scaled_phi = phi / limit * (1.0 if self.form == "code" else self.scale)
        inside = (self.scale * raw).addcmul_(low, scaled_phi, value=-overlap)  # a line's factor commutes with up
        return inside, scaled_phi


@dataclass
class ScaledGradient(Lift):
    """APOLLO (arXiv 2412.05270): the raw gradient, scaled as an Adam in the subspace would have scaled it.

    phi = ||N|| / (||R|| + 1e-8), a channel each or one for the tensor;  S = phi * G, whose norm may grow by 1 % an
    update;  direction = factor * sqrt(scale) * S. The subspace is a meter and no part of the update lies in it.
    """

    scale: float = 1.0  # the code takes its root: APOLLO-Mini's 128 is the paper's alpha of sqrt(128)
    per: Literal["channel", "tensor"] = "channel"
    scale_first: bool = False  # before the limiter, as scale_front in the code
    limited: bool = True

    def __post_init__(self) -> None:
        self.needs_gradient = self.needs_lines = True

    def init(self, param: Tensor, slot: Slot) -> State:
        return limiter_state(param) if self.limited else {}

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        assert grad is not None
        axis = line_axis(subspace, state, param)
        dim = axis if self.per == "channel" else None
        raw, low = wide(low_update.raw()), wide(low_grad)
        phi = norms_along(raw, dim, keepdim=True)
        phi = phi / (norms_along(low, dim, keepdim=True) + EPS)
        root = math.sqrt(self.scale)
        if self.limited:
            total = torch.linalg.vector_norm(norms_along(grad, dim, keepdim=True) * phi)
            phi = phi / limiter(state, total * (root if self.scale_first else 1.0))
        return LineScaled(grad, phi.to(grad.dtype), factor=low_update.factor * root)


def line_axis(subspace: Subspace, state: State, param: Tensor) -> int:
    """The axis along which a line's norm is taken: the compressed one."""
    side = subspace.side_of(state, param.shape)
    if side == "both":
        raise ValueError("strategy.subspace leaves no line uncompressed to be scaled; use side=std, or of=rows")
    return 1 if side == "right" else 0


def limiter_state(param: Tensor) -> State:
    """The norm that was let through last; float32, since it changes by 1 %, which bfloat16 hardly resolves."""
    return {"limited_norm": torch.zeros((), dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)}


def limiter(state: State, norm: Tensor) -> Tensor:
    """What to divide by, so that the norm grows at most by GROWTH; remembers the norm let through.

    A norm of zero is not remembered: the published codes are limited to 1e-8 after one and need 1,850 updates to
    recover.
    """
    last = tensor_of(state, "limited_norm")
    limit = torch.where(last > 0, (norm / (last + EPS) / GROWTH).clamp_min(1.0), 1.0)
    last.copy_(torch.where(norm > 0, norm / limit, last))
    return limit


@dataclass
class SignOfBackprojection(Lift):
    """sign(up(u)): the lift of Online Subspace Descent's Lion, which takes the sign of the full matrix."""

    row_wise = True

    def __post_init__(self) -> None:
        self.takes_sign = True

    def lift(
        self,
        low_update: Direction,
        low_grad: Tensor,
        grad: Tensor | None,
        subspace: Subspace,
        state: State,
        param: Tensor,
    ) -> Direction:
        return Dense(subspace.up(low_update.raw(), state, param.shape).tensor().sign_())
