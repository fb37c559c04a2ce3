"""A lift that takes the matrix whole at the few positions where the subspace leaves most of it out: GaLore+'s."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_train.optim.direction import Dense, Direction
from lowrank_train.optim.lift import Lift
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Rates, Slot, State, counter, tensor_of


@dataclass
class SparseResidual(Lift):
    """scale * up(u), but Adam's own direction at a share of the positions (GaLore+, arXiv 2412.19820).

    For `warmup` updates the squares of E = G - up(down(G)) are summed, and the update is GaLore's. Then the positions I
    with the largest sums are fixed, and keep exact moments m_I, v_I of G from there on:
      direction = scale * up(u), with its entries at I replaced by Adam(G_I)
    The paper gives the idea; the sum, its length and the replacement are a reconstruction. The sums are a float32
    matrix during the warm-up, and gone after it; what stays is 4 bytes and two moments a position.
    """

    scale: float = 0.25
    share: float = 0.01  # of the positions of a matrix
    warmup: int = 100  # updates before the positions are chosen
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    eps_inside: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"strategy.lift.share is {self.share}; it must be above 0 and at most 1")
        if self.warmup < 1:
            raise ValueError(f"strategy.lift.warmup is {self.warmup}; it must be at least 1")
        self.needs_gradient = True
        self._adam = Adam(self.betas, self.eps, self.eps_inside)

    def init(self, param: Tensor, slot: Slot) -> State:
        count = max(1, int(param.numel() * self.share))
        positions = torch.zeros(count, dtype=torch.int32, device=param.device)
        moments = self._adam.init(torch.empty(count, device=param.device), slot)
        energy = torch.zeros_like(param, dtype=torch.promote_types(slot.dtype, torch.float32))
        state: State = {"lifts_done": 0, "residual_energy": energy, "positions": positions}
        return state | {f"position_{name}": value for name, value in moments.items()}

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
        done = state["lifts_done"] = counter(state, "lifts_done") + 1
        inside = subspace.up(low_update.raw(), state, param.shape).scaled(self.scale * low_update.factor)
        if done <= self.warmup:
            self._warm_up(subspace.subtract_(grad, low_grad, state), state, last=done == self.warmup)
            return inside
        positions = tensor_of(state, "positions").long()
        own = {name.removeprefix("position_"): v for name, v in state.items() if name.startswith("position_")}
        exact = self._adam.update(grad.take(positions), own, param, Rates(0.0, 0.0)).tensor()
        state["position_step"] = own["step"]
        direction = inside.tensor()
        return Dense(direction.put_(positions, exact.to(direction.dtype)))

    def _warm_up(self, residual: Tensor, state: State, last: bool) -> None:
        energy = tensor_of(state, "residual_energy").add_(residual.square())
        if last:
            positions = tensor_of(state, "positions")
            chosen = energy.flatten().sort(descending=True, stable=True).indices[: len(positions)]
            positions.copy_(chosen.sort().values)
            del state["residual_energy"]
