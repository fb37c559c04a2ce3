"""Work shared out among processes, and matrices that lie in row shards made whole on their owners and cut up again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Size, Tensor

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.transform import Slot, State, Transform

Member = tuple[Tensor, Slot, Transform]
"""A parameter, of its whole shape, with what serves it."""


def shared_out(costs: Sequence[float], count: int) -> list[int]:
    """The owner of each piece of work: the largest first, each to the process that has least; ties to the first."""
    load, owners = [0.0] * count, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(count), key=lambda rank: (load[rank], rank))
        owners[index] = owner
        load[owner] += costs[index]
    return owners


def rows_of(length: int, rank: int, count: int) -> slice:
    """The rows that a process holds of `length`, as torch.chunk cuts them: the last ones may hold fewer, or none."""
    each = -(-length // count)
    return slice(min(rank * each, length), min((rank + 1) * each, length))


def owner_of_each(members: Sequence[Member], count: int, rounding: Rounding) -> list[int | None]:
    """The rank that serves each parameter whole; None where all serve their rows. Runs on the meta device.

    Rows are served apart where the rule treats them apart, each rank has some, and no random bits are drawn for the
    matrix as a whole. Of the others every owner has about as many numbers.
    """
    apart = []
    for param, slot, rule in members:
        last = rows_of(param.shape[0], count - 1, count)
        drawn = rounding == "stochastic" and param.dtype is torch.bfloat16
        apart.append(not drawn and last.start < last.stop and rule.row_wise(_meta(param), slot))
    places = [place for place, is_apart in enumerate(apart) if not is_apart]
    owners = dict(zip(places, shared_out([members[place][0].numel() for place in places], count), strict=True))
    return [owners.get(place) for place in range(len(members))]


def _meta(param: Tensor) -> Tensor:
    return torch.empty(param.shape, dtype=param.dtype, device="meta")


def lines_of(state: State, rule: Transform) -> dict[str, Tensor]:
    """The tensors with one line for each row of the parameter, of a rule that treats rows apart: all but the basis."""
    shared = set(rule.moved_keys(state))
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in shared}


class RowShards:
    """Tensors cut along their first dimension over all processes: rank r holds the rows that `rows_of` says.

    All calls are collective: every process makes them with the same shapes and owners, in the same order. Tensors of
    one call have one dtype.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def numel(self, shape: Size, rank: int) -> int:
        """Numbers that a process holds of a tensor of this whole shape."""
        rows = rows_of(shape[0], rank, self.count)
        return (rows.stop - rows.start) * shape[1:].numel()

    def to_owners(self, shards: Sequence[Tensor], shapes: Sequence[Size], owners: Sequence[int]) -> dict[int, Tensor]:
        """Send the shard of each tensor to its owner; those that this process owns, whole, by their place in the list.

        One message between each two processes. Of n bytes of tensors n (1 - 1/count) go over the wire.
        """
        owned = self._by_owner(owners)
        mine = owned[self.rank]
        sent = torch.cat([shards[i].reshape(-1) for theirs in owned for i in theirs])
        leaving = [sum(self.numel(shapes[i], self.rank) for i in theirs) for theirs in owned]
        arriving = [sum(self.numel(shapes[i], rank) for i in mine) for rank in range(self.count)]
        received = sent.new_empty(sum(arriving))
        dist.all_to_all_single(received, sent, arriving, leaving)
        if len(mine) == 1:
            return {mine[0]: received.view(shapes[mine[0]])}
        parts = received.split([self.numel(shapes[i], rank) for rank in range(self.count) for i in mine])
        return {i: torch.cat(parts[place :: len(mine)]).view(shapes[i]) for place, i in enumerate(mine)}

    def from_owners(
        self, wholes: dict[int, Tensor], into: Sequence[Tensor], shapes: Sequence[Size], owners: Sequence[int]
    ) -> None:
        """The way back: every shard takes its rows of the tensor that its owner has whole."""
        owned = self._by_owner(owners)
        mine = owned[self.rank]
        cut = [
            wholes[i][rows_of(shapes[i][0], rank, self.count)].reshape(-1) for rank in range(self.count) for i in mine
        ]
        sent = torch.cat(cut) if cut else into[0].new_empty(0)
        leaving = [sum(self.numel(shapes[i], rank) for i in mine) for rank in range(self.count)]
        arriving = [sum(self.numel(shapes[i], self.rank) for i in theirs) for theirs in owned]
        received = sent.new_empty(sum(arriving))
        dist.all_to_all_single(received, sent, arriving, leaving)
        order = [i for theirs in owned for i in theirs]
        for i, part in zip(order, received.split([self.numel(shapes[i], self.rank) for i in order]), strict=True):
            into[i].copy_(part.view(into[i].shape))

    def _by_owner(self, owners: Sequence[int]) -> list[list[int]]:
        return [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(self.count)]
