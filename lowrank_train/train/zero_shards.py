"""The optimizer under ZeRO: number by number on flat shards, and to everybody else one of whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_train.checkpoint_shards import whole_shape
from lowrank_train.optim.exact_optimizer import bytes_by_kind
from lowrank_train.optim.groups import Group
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.transform import Rates, State, Transform


@dataclass(frozen=True)
class Place:
    """Where this rank keeps its numbers of a parameter: from `first` on, `count` of them, in `shard` from `at` on."""

    shard: Tensor
    at: int
    first: int
    count: int

    @classmethod
    def of(cls, param: Any, group: dict[str, Any]) -> Place:
        """As DeepSpeed has noted it at the parameter."""
        zero = getattr(param, "_z3_optimizer", None)
        if zero is not None:  # stage 3 gives every rank as many numbers of each parameter, and pads the last part
            number, at, length = zero.grad_position[zero.get_param_id(param)]
            first = dist.get_rank() * length
            count = max(0, min(length, param.ds_numel - first))
            return cls(zero.fp32_partitioned_groups_flat[number], at, first, count)
        (shard,) = group["params"]
        if param._hp_mapping is None:  # stages 1 and 2 cut up the group, and this one lies on other ranks
            return cls(shard, 0, 0, 0)
        here, there = param._hp_mapping.hp_fragment_address, param._hp_mapping.lp_fragment_address
        return cls(shard, here.start, there.start, there.numel)

    def here(self, value: Tensor) -> Tensor:
        """The part of what is kept with the shard."""
        return value.narrow(0, self.at, self.count)

    def there(self, whole: Tensor) -> Tensor:
        """The same part of what belongs to the whole parameter."""
        return whole.reshape(-1).narrow(0, self.first, self.count)


class ShardOptimizer(TransformOptimizer):
    """p <- p - lr * transform(grad), where ZeRO puts one flat tensor in the place of the parameters of each group.

    The tensor holds this rank's share of the group's numbers, end to end, in float32, and ZeRO calls step() once a
    group (under stage 3 once for each tensor, where it makes several of a large group), after it has averaged and
    clipped. So the rules have to be elementwise. state_dict() is that of a process that has whole parameters, and
    load_state_dict() takes such a one, whoever saved it; both are called on all ranks at once.
    """

    def __init__(self, groups: list[Group], *, lr: float, weight_decay: float) -> None:
        assert all(group.transform.elementwise for group in groups), "refused before anything was built"
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self._members = {group.name: [param for _, param in group.params] for group in groups}
        self._rules: dict[str, Transform] = {group.name: group.transform for group in groups}

    @classmethod
    def like(cls, whole: TransformOptimizer) -> ShardOptimizer:
        """One that serves the same groups; it is to be handed to ZeRO."""
        groups = [
            Group(
                group["name"],
                rule,
                list(zip(group["param_names"], group["params"], strict=True)),
                [whole.slots[param] for param in group["params"]],
                group["lr_ratio"],
            )
            for group, rule in zip(whole.param_groups, whole.transforms, strict=True)
        ]
        return cls(groups, lr=whole.base_lr, weight_decay=whole.param_groups[0]["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None, "ZeRO has the gradients by now"
        for group in self.param_groups:
            rule = self._rules[group["name"]]
            rates = Rates(group["lr"], self.base_lr * group["lr_ratio"])
            for shard in group["params"]:
                if shard.grad is not None:
                    decay = rates.lr * group["weight_decay"]
                    rule.apply(shard.grad, self._state_of_shard(rule, shard), shard, rates, decay)

    def state_bytes(self) -> dict[str, int]:
        """On this rank."""
        return bytes_by_kind(self.state.values())

    def state_dict(self) -> dict[str, Any]:
        """With the state of whole parameters in main memory, on the first rank; the others have none in theirs."""
        states: dict[int, State] = {}
        groups: list[dict[str, Any]] = []
        counted = 0
        for group, params in self._groups():
            numbers = list(range(counted, counted + len(params)))
            counted += len(params)
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": numbers})
            for number, param in zip(numbers, params, strict=True):
                place = Place.of(param, group)
                kept: State = self.state.get(place.shard, {})
                whole = {key: _whole(param, place, value) for key, value in kept.items()}
                if whole and dist.get_rank() == 0:
                    states[number] = whole
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError when the parameters are not the ones that were saved."""
        for (group, params), theirs in zip(self._groups(), state_dict["param_groups"], strict=True):
            if group["param_names"] != theirs["param_names"]:
                raise ValueError(f"the saved optimizer state of group {theirs['name']!r} is for other parameters")
            saved = [state_dict["state"].get(number, {}) for number in theirs["params"]]
            if any(saved):
                for param, state in zip(params, saved, strict=True):
                    place = Place.of(param, group)
                    _take_part(place, state, self._state_of_shard(self._rules[group["name"]], place.shard))

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        return ((group, self._members[group["name"]]) for group in self.param_groups)

    def _state_of_shard(self, rule: Transform, shard: Tensor) -> State:
        state: State = self.state[shard]
        if not state:
            any_member = next(iter(self.slots.values()))
            state.update(rule.init(shard, any_member))
        return state


def _whole(param: Any, place: Place, value: Tensor | int) -> Tensor | int:
    """What all ranks keep for a parameter, from the flat tensor that each keeps for a group."""
    if isinstance(value, int):
        return value
    shape = whole_shape(param)
    whole = torch.zeros(shape.numel(), dtype=value.dtype, device=value.device)
    place.there(whole).copy_(place.here(value))
    dist.all_reduce(whole)
    return whole.view(shape).cpu()


def _take_part(place: Place, saved: State, own: State) -> None:
    for key, value in saved.items():
        mine = own.get(key)
        if isinstance(value, int):
            own[key] = value
        elif isinstance(mine, Tensor):
            place.here(mine).copy_(place.there(value))
