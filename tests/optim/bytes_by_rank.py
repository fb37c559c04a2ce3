"""State of sharded parameters by rank, from owners and rows: what optimizers and the planner are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.exact_optimizer import bytes_by_kind
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.owners import Member, lines_of, owner_of_each, rows_of
from lowrank_train.optim.rounded_weights import RoundedWeights
from lowrank_train.optim.transform import State, Transform


def members_of(optimizer: TransformOptimizer) -> list[Member]:
    """Of an optimizer of whole parameters."""
    return [(param, slot, optimizer.transform_of[param]) for param, slot in optimizer.slots.items()]


def state_bytes_by_rank(members: Sequence[Member], count: int, rounding: Rounding) -> list[int]:
    """Bytes of state that each of `count` processes keeps of sharded parameters, counted on the meta device."""
    bytes_of = [0] * count
    for (param, slot, rule), owner in zip(members, owner_of_each(members, count, rounding), strict=True):
        whole = torch.empty(param.shape, dtype=param.dtype, device="meta")
        state = rule.init(whole, slot) | RoundedWeights(rounding).state(whole)
        for rank in range(count) if owner is None else [owner]:
            rows = None if owner is not None else rows_of(param.shape[0], rank, count)
            bytes_of[rank] += sum(bytes_by_kind([_with_rows(state, rule, rows)]).values())
    return bytes_of


def _with_rows(state: State, rule: Transform, rows: slice | None) -> State:
    """The state with these rows of the tensors that have one line for each row of the parameter."""
    if rows is None:
        return state
    lines = lines_of(state, rule)
    return {key: lines[key][rows] if key in lines else value for key, value in state.items()}
