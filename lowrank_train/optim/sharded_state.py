"""How one sharded parameter is served, and what each process keeps, saves and loads of its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Size, Tensor
from torch.distributed.tensor import DTensor, Shard

from lowrank_train.optim.exact_optimizer import ExactOptimizer
from lowrank_train.optim.owners import lines_of, rows_of
from lowrank_train.optim.transform import State, Transform


@dataclass(frozen=True)
class Part:
    """How one parameter is served."""

    param: DTensor
    owner: int | None  # None: every rank serves its rows
    like: Tensor  # of the whole shape, with memory for a single number; on the meta device where no state is kept

    @property
    def shape(self) -> Size:
        """Of the whole parameter."""
        return self.param.shape

    @property
    def shard(self) -> Tensor:
        """The rows that lie here: a plain tensor in the parameter's own memory."""
        return self.param.to_local()

    @property
    def rows(self) -> slice:
        """Of the whole parameter, those that lie here."""
        return rows_of(self.shape[0], dist.get_rank(), dist.get_world_size())

    @property
    def is_kept(self) -> bool:
        """Whether this process keeps state of it."""
        return self.owner in (None, dist.get_rank())

    def keep_own(self, rule: Transform, state: State) -> None:
        """Of a state that was made for the whole parameter, or in part already, leave what is kept here."""
        if self.owner is None and self.shard.shape != self.shape:
            for key, value in lines_of(state, rule).items():
                if len(value) == self.shape[0]:
                    state[key] = value[self.rows].clone()

    def as_saved(self, rule: Transform, state: State) -> State:
        """Tensors that are cut up as sharded ones, the others as they are."""
        if self.owner is not None:
            return state
        mesh = self.param.device_mesh
        return state | {
            key: DTensor.from_local(value, mesh, [Shard(0)], shape=self._whole(value), stride=value.stride())
            for key, value in lines_of(state, rule).items()
        }

    def from_saved(self, rule: Transform, state: State) -> State:
        """What is kept here of a saved state, of whole tensors or of those that are cut up among these processes.

        Of a tensor with a clock, and another owner, the integers count, and tensors may lie on the meta device.
        """
        if self.owner is None:
            lines = lines_of(state, rule)
            return {key: self._own(lines[key]) if key in lines else value for key, value in state.items()}
        opened = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
        return opened if self.is_kept or rule.clocked else {}

    def masking(self, keep: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
        """`keep`, which sees the whole moment, for the rows of it that lie here. A collective call."""
        if self.owner is not None:
            return keep

        def keep_rows(name: str, value: Tensor) -> Tensor:
            mesh = self.param.device_mesh
            cut = DTensor.from_local(value, mesh, [Shard(0)], shape=self._whole(value), stride=value.stride())
            return keep(name, cut.full_tensor())[self.rows]

        return keep_rows

    def _whole(self, value: Tensor) -> Size:
        return Size((self.shape[0], *value.shape[1:]))

    def _own(self, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            if value.placements == (Shard(0),) and value.device_mesh == self.param.device_mesh:
                return value.to_local()
            value = value.full_tensor()
        return value[self.rows]


def whole_state_dict(optimizer: ExactOptimizer) -> dict[str, object] | None:
    """What a single process would have saved, on rank 0's CPU; None on the others. A collective call.

    Every parameter's state is sent by itself, so that no other process holds more than one of them whole.
    """
    saved = optimizer.state_dict()
    states: dict[int, State] = {}
    for number in range(sum(len(group["params"]) for group in saved["param_groups"])):
        state = {key: _on_cpu(value) for key, value in saved["state"].get(number, {}).items()}
        senders: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(senders, bool(state))
        if not senders[0] and any(senders):
            received = [state]
            if senders.index(True) == dist.get_rank():
                dist.send_object_list(received, dst=0)
            elif dist.get_rank() == 0:
                dist.recv_object_list(received, src=senders.index(True))
            state = received[0]
        if state and dist.get_rank() == 0:
            states[number] = state
    return saved | {"state": states} if dist.get_rank() == 0 else None


def _on_cpu(value: Tensor | int) -> Tensor | int:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
