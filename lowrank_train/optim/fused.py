"""Projected steps by kernels: the projection with Adam's moments, and the back-projection with all that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step
from lowrank_train.kernels.affine import Affine
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.kernels.lifted_update import AdamDirection, Residual, lifted_update_
from lowrank_train.kernels.projected_adam import Moment, projected_adam
from lowrank_train.optim.direction import RootQuotient
from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.lift import Backproject, Lift, ScaledResidual, StateFreeResidual
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.stored import CODES, MOMENTS, SCALE, Storage, Stored
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.optim.transform import Rates, State, Transform, counter, tensor_of


@dataclass(frozen=True)
class FusedStep:
    """The step of Adam in a dense basis of one side, its lift back-projecting alone or with a residual beside it.

    The numbers are those of the composition in plain torch but for rounding: the small gradient stays in float32, and
    the weights are rounded once, with decay and residual in them, where torch's operations round one after the other.
    The first kernel reads G, the second reads and writes W, and reads G again where there is a residual; the norms of
    Fira's lines read it a third time.
    """

    subspace: DenseBasis
    adam: Adam
    storage: Storage | None
    lift: Backproject | ScaledResidual | StateFreeResidual

    @staticmethod
    def of(subspace: Subspace, inner: Transform, lift: Lift, feedback: ErrorFeedback | None) -> FusedStep | None:
        """None where the combination has no kernels."""
        adam, storage = (inner.inner, inner.storage) if isinstance(inner, Stored) else (inner, None)
        if type(adam) is not Adam or not isinstance(subspace, DenseBasis) or feedback is not None:
            return None
        if subspace.side == "full":
            return None
        if not isinstance(lift, Backproject | ScaledResidual | StateFreeResidual):
            return None
        if isinstance(lift, StateFreeResidual) and lift.residual != "sign":
            return None
        if storage is not None and (storage.table or not is_tile(storage.block)):
            return None
        return FusedStep(subspace, adam, storage, lift)

    def serves(self, given: Tensor, state: State, param: Tensor, grad: Tensor | None = None) -> bool:
        """Whether kernels run on these tensors, `given` being a gradient or a small one, and read this state."""
        if isinstance(param, Int8Weight) and (param.published or not is_tile(param.group)):
            return False
        parts = param.parts().values() if isinstance(param, Int8Weight) else [param]
        if not runs_kernel(*parts, given, grad) or not all(part.is_contiguous() for part in parts):
            return False
        return self._moments(state) is not None

    def whole_step(
        self,
        grad: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: float,
        grad_factor: float,
        seed: int | None,
    ) -> Tensor:
        """The update of W by grad_factor * grad, while the subspace rests; returns the norm of down(grad)."""
        (side, basis), (first, second) = self._operands(state)
        bias, eps = self._count(state)
        keep_low = not isinstance(self.lift, Backproject)
        if keep_low and grad_factor != 1.0:  # the lift reads the gradient too
            grad.mul_(grad_factor)
        storage = Storage() if self.storage is None else self.storage
        small, low, norm = projected_adam(
            grad,
            basis,
            first,
            second,
            side=side,
            betas=self.adam.betas,
            eps=eps,
            grad_factor=1.0 if keep_low else grad_factor,
            block=storage.block,
            keep_nonzero=storage.keep_nonzero,
            keep_low=keep_low,
        )
        self._lift(small, low, grad, (side, basis), bias, state, param, rates, decay, seed)
        return norm / grad_factor

    def step(self, low: Tensor, state: State, param: Tensor, rates: Rates, decay: float, grad: Tensor | None) -> None:
        """The update of W by a small gradient that is there already."""
        operands, (first, second) = self._operands(state)
        bias, eps = self._count(state)
        small: Tensor | AdamDirection
        if isinstance(first, tuple) and isinstance(second, tuple):
            assert self.storage is not None
            small = torch.zeros(low.shape, device=low.device)
            adam_8bit_step(
                small,
                low,
                first,
                second,
                step_size=-1.0,
                betas=self.adam.betas,
                eps=eps,
                block=self.storage.block,
                keep_nonzero=self.storage.keep_nonzero,
            )
        else:
            assert isinstance(first, Tensor) and isinstance(second, Tensor)
            self.adam.take_in(low, state)
            small = AdamDirection(first, second, eps)
        self._lift(small, low, grad, operands, bias, state, param, rates, decay)

    def _lift(
        self,
        small: Tensor | AdamDirection,
        low: Tensor | None,
        grad: Tensor | None,
        basis: tuple[Literal["left", "right"], Tensor],
        bias: float,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: float,
        seed: int | None = None,
    ) -> None:
        """W <- W - lr * lift(bias * small), with the decay."""
        step, residual = -rates.lr * bias, None
        if isinstance(self.lift, StateFreeResidual):
            assert grad is not None and low is not None
            if low.numel() < grad.numel():
                residual = Residual(grad, -rates.lr * self.lift.scale * self.lift.residual_scale, low=low)
        if isinstance(self.lift, ScaledResidual):
            assert grad is not None and low is not None
            raw = small if isinstance(small, Tensor) else RootQuotient(*vars(small).values()).raw()
            small, line = self.lift.joined(raw, low, grad, self.subspace, state, param)
            residual = Residual(grad, step, line=line)
        else:
            step *= self.lift.scale
        weight: Tensor | Affine = param
        group, (side, by) = 1, basis
        if isinstance(param, Int8Weight):
            weight, group, by = param.affine, param.group, by.to(param.dtype)  # the products are in the basis' dtype
        lifted_update_(
            weight,
            small,
            by,
            side=side,
            factor=step,
            residual=residual,
            decay=decay,
            decay_first=self.adam.weight_decay_first,
            group=group,
            seed=seed,
        )

    def _count(self, state: State) -> tuple[float, float]:
        """One more step: the bias correction as a factor, and eps that goes with it."""
        step = state["step"] = counter(state, "step") + 1
        state["updates_done"] = counter(state, "updates_done") + 1
        return self.adam.factor_and_eps(step)

    def _operands(self, state: State) -> tuple[tuple[Literal["left", "right"], Tensor], tuple[Moment, Moment]]:
        moments = self._moments(state)
        assert moments is not None
        return self.subspace.one_basis(state), moments

    def _moments(self, state: State) -> tuple[Moment, Moment] | None:
        """Both as they are stored, in tensors or in 8-bit codes; None where the kernels cannot read one of them."""
        if all(key in state for key in MOMENTS):
            first, second = (tensor_of(state, key) for key in MOMENTS)
            return (first, second) if first.is_contiguous() and second.is_contiguous() else None
        if all(key + CODES in state for key in MOMENTS):
            first_codes, second_codes = ((tensor_of(state, k + CODES), tensor_of(state, k + SCALE)) for k in MOMENTS)
            return first_codes, second_codes
        return None
