"""A basis learned by gradient descent on its reconstruction error: Online Subspace Descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.direction import wide
from lowrank_train.optim.moments import Adam, Lion
from lowrank_train.optim.stored import Stored
from lowrank_train.optim.subspace.base import require_one_side
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of


@dataclass
class Online(Svd):
    """B <- B - lr_B rule(dl/dB), l(B) = ||g B B^T - g||_F^2, g = G / ||G||_F (Liang et al., arXiv 2408.12857).

    dl/dB = -4 C B + 2 (C B (B^T B) + B (B^T C B)), C = g^T g (right side; left: g g^T), formed through g B alone.
    The first basis is the exact decomposition. From the second update on the gradient of B is taken with the
    basis in force, which also serves the update; B moves after it, by lr_B = (1 / every) * (lr / base lr).
    With adam8bit the two moments of B take a byte a number each.
    """

    every: int = 200  # 1 / the learning rate of the basis: the published code reuses update_proj_gap
    rule: Literal["adamw", "adam8bit", "adafactor", "lion", "sgd"] = "adamw"
    weight_decay: float = 0.01  # of the basis, torch's default for AdamW, which the published code inherits

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_side(self)
        rules: dict[str, Transform | None] = {
            "adamw": Adam(),
            "adam8bit": Stored(Adam()),
            "adafactor": Adafactor(),
            "lion": Lion(),
            "sgd": None,
        }
        self.learner = rules[self.rule]

    orthonormal: ClassVar[bool] = False
    codable: ClassVar[bool] = False
    row_wise: ClassVar[bool] = False  # the basis learns from all rows, after they have been projected

    def _init_basis(self, param: Tensor, slot: Slot) -> State:
        state = super()._init_basis(param, slot)
        (key,) = self._keys(state)
        basis = tensor_of(state, key)
        state["basis_grad"] = torch.zeros_like(basis)
        if self.learner is not None:
            state |= {f"basis_{name}": value for name, value in self.learner.init(basis, slot).items()}
        return state

    def schedule_next(self, state: State, updates_done: int, moved: bool) -> None:
        super().schedule_next(state, updates_done, moved)
        state["refresh_at"] = updates_done + 1  # the basis learns at every update

    def refresh(self, grad: Tensor, state: State) -> bool:
        given = None
        if self.source is not None:
            given = self.source(counter(state, "seed"), counter(state, "updates_done") + 1, grad)
        if given is not None:
            self.take(given, state, grad.shape)
        elif counter(state, "refreshes") == 0:
            return self.move(grad, state)
        return bool(torch.linalg.vector_norm(grad) != 0)

    @property
    def always_moves(self) -> bool:
        return True  # `every` is a rate of learning

    def observe(self, grad: Tensor, low: Tensor, state: State) -> None:
        """Take the slope of l in the basis in force, from the second update on."""
        if counter(state, "refreshes") < 2:
            return
        (key,) = self._keys(state)
        rows, low = (wide(grad), wide(low)) if key == "basis_right" else (wide(grad).T, wide(low).T)
        norm = torch.linalg.vector_norm(rows).clamp_min(torch.finfo(rows.dtype).tiny)
        basis, low = wide(tensor_of(state, key)), low / norm  # g is never formed: only small products are divided
        covariance = rows.T @ low / norm  # C B
        weight = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device).mul_(-4)
        slope = covariance @ weight.addmm_(basis.T, basis, alpha=2)
        tensor_of(state, "basis_grad").copy_(slope.addmm_(basis, basis.T @ covariance, alpha=2))

    def settle(self, state: State, rates: Rates) -> None:
        if counter(state, "refreshes") < 2:  # the first basis serves two updates
            return
        (key,) = self._keys(state)
        basis, slope = tensor_of(state, key), tensor_of(state, "basis_grad")
        lr = rates.lr / rates.base_lr / self.every
        if self.learner is None:
            basis.add_(slope, alpha=-lr)
            return
        own = {name.removeprefix("basis_"): value for name, value in state.items() if name.startswith("basis_")}
        basis.mul_(1 - lr * self.weight_decay)
        self.learner.update(slope, own, basis, rates).add_to_(basis, -lr)
        state["basis_step"] = own.get("step", 0)
