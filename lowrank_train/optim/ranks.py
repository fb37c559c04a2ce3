"""What one process has and what all have: gradients are averaged, and bases are moved by one rank for the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.groups import Group
from lowrank_train.optim.served import Served
from lowrank_train.optim.transform import Move, tensor_of
from lowrank_train.optim.update_stats import synchronized_sec

if TYPE_CHECKING:
    from lowrank_train.optim.optimizer import TransformOptimizer

BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together: DDP's bucket_cap_mb, 25 MiB."""

Averaged = Literal["before", "gradients", "projected"]
Ready = Iterable[tuple[Tensor, dict[str, Any]]]


class Ranks(Served):
    """One process alone: what it has is what all have."""

    count = 1
    averaged: Averaged = "before"

    def __init__(self) -> None:
        self.moves: dict[Tensor, Move] = {}  # found for all, until the basis takes its place

    def make_common(self, optimizer: TransformOptimizer) -> None:
        """Before step() looks at the gradients that no hook has consumed."""

    def make_one_common(self, optimizer: TransformOptimizer, param: Tensor) -> None:
        """The same inside the backward pass, of the parameter whose gradient has just been made."""

    def in_rounds(
        self, optimizer: TransformOptimizer, ready: Ready, grad_factor: float = 1.0, *, updating: bool = True
    ) -> Ready:
        """The same parameters; those whose basis is due come when `moves` holds where to.

        updating: their weights are about to change, and not just their gradients to be compressed.
        """
        return ready


class Together(Ranks):
    """Several processes, each with the whole model and a part of the batch; their gradients are means of all.

    averaged="before": by who hands the gradients over, such as torch's DistributedDataParallel.
    averaged="gradients": here, each as it is, in the moment before it is used.
    averaged="projected": here, and of a matrix in a subspace the compressed gradient alone, since compressing is
        linear: mean(down(G_k)) = down(mean(G_k)). It is R / min(M, N) as large. The gradient goes whole where the basis
        is due to move, where the lift uses it, where errors are fed back, and where nothing is compressed. A number
        that is not finite is noticed if the small gradient shows it, and norms of whole gradients remain unknown.

    A basis that is due moves on one rank, with the same gradient as all ranks have, and the others take what it has
    found. As many move at a time as there are ranks, the costliest first. What is `own` to each rank is left alone.
    """

    def __init__(self, averaged: Averaged, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.averaged = averaged
        self.own = set(own)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def make_common(self, optimizer: TransformOptimizer) -> None:
        if self.averaged == "before":
            return
        whole, small = [], []
        for param in self._with_gradient_anywhere(optimizer):
            if param.grad is not None and self._is_enough_compressed(optimizer, param):
                self._compress(optimizer, param)
            if param.grad is not None:
                whole.append(param.grad)
            elif self.averaged == "projected":
                small.append(optimizer._pending[param])
        self._average(whole + small)

    def make_one_common(self, optimizer: TransformOptimizer, param: Tensor) -> None:
        if self.averaged == "before" or param in self.own:
            return
        if not self._is_enough_compressed(optimizer, param):
            assert param.grad is not None
            self._average([param.grad])
            return
        self._compress(optimizer, param)
        if optimizer.when == "in_backward":  # else those of several micro-batches are added up first
            self._average([optimizer._pending[param]])

    def in_rounds(
        self, optimizer: TransformOptimizer, ready: Ready, grad_factor: float = 1.0, *, updating: bool = True
    ) -> Iterator[Any]:
        due = []
        for param, group in ready:
            if self._moves_by_one(optimizer, param):
                due.append((param, group))
            else:
                yield param, group
        shapes = {param: self.like(param).shape for param, _ in due}
        due.sort(key=lambda item: -shapes[item[0]].numel() * min(shapes[item[0]]))
        for start in range(0, len(due), self.count):
            together = due[start : start + self.count]
            self._find(optimizer, [param for param, _ in together], grad_factor)
            yield from together

    def _is_enough_compressed(self, optimizer: TransformOptimizer, param: Tensor) -> bool:
        """Whether the small gradient of this parameter is all that an update needs to be the same on all ranks."""
        rule = optimizer.transform_of[param]
        if self.averaged != "projected" or not rule.compresses or not rule.accumulates or rule.needs_gradient:
            return False
        return param not in self.own and not rule.refresh_due(optimizer._state(param))

    def _compress(self, optimizer: TransformOptimizer, param: Tensor) -> None:
        """Without a look at its whole gradient, which is this rank's alone."""
        optimizer._current.norm_known = False
        optimizer._compress(param)

    def _moves_by_one(self, optimizer: TransformOptimizer, param: Tensor) -> bool:
        """Whether the next compression moves a basis, and one rank is to find out where to."""
        rule = optimizer.transform_of[param]
        if not rule.compresses or param.grad is None or param in self.own:
            return False
        state = optimizer._state(param)
        return rule.refresh_due(state) and rule.moves_alone(state)

    def _find(self, optimizer: TransformOptimizer, params: Sequence[Tensor], grad_factor: float) -> None:
        """Fill `moves` for at most as many parameters as there are ranks, each on a rank of its own."""
        started_sec = synchronized_sec(params[0].device)
        states = [optimizer._state(param) for param in params]
        first = optimizer.slots[params[0]].seed  # inside the backward pass they come one at a time
        owners = [(first + place) % self.count for place in range(len(params))]
        gradients = self._whole_gradients(params, owners)
        keys = [optimizer.transform_of[param].moved_keys(state) for param, state in zip(params, states, strict=True)]
        numbers: list[int] = []  # of each parameter whether its basis moves, and the integers that go with it
        for param, state, owner, names in zip(params, states, owners, keys, strict=True):
            if owner == self.rank:
                grad = gradients[param]
                found = self.moves[param] = optimizer.transform_of[param].find(grad, state, grad_factor)
                numbers += [int(found.moved), *(value for value in found.entries.values() if isinstance(value, int))]
            else:
                numbers += [0] * (1 + sum(isinstance(state[name], int) for name in names))
        told = torch.tensor(numbers, dtype=torch.int64, device=params[0].device)
        dist.all_reduce(told)  # each number is 0 on all ranks but one
        said = iter(told.tolist())
        for param, state, owner, names in zip(params, states, owners, keys, strict=True):
            moved, entries = bool(next(said)), dict[str, Tensor | int]()
            for name in names:
                value = state[name]
                if isinstance(value, int):
                    entries[name] = next(said)
                    continue
                mine = tensor_of(self.moves[param].entries, name) if owner == self.rank else torch.empty_like(value)
                dist.broadcast(mine, src=owner)
                entries[name] = mine
            self.moves[param] = Move(moved, entries)
        optimizer._current.refresh_sec += synchronized_sec(params[0].device) - started_sec

    def _whole_gradients(self, params: Sequence[Tensor], owners: Sequence[int]) -> dict[Tensor, Tensor]:
        """At least of what is this rank's to move."""
        return {param: param.grad for param in params if param.grad is not None}

    def _with_gradient_anywhere(self, optimizer: TransformOptimizer) -> list[Tensor]:
        """Parameters that have a gradient on some rank; where others have it, this one's is zero."""
        awake = [param for param, _ in optimizer._awake() if param not in self.own]
        if not awake:
            return []
        has = [param.grad is not None or param in optimizer._pending for param in awake]
        flags = torch.tensor(has, dtype=torch.int32, device=awake[0].device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        found = [(param, here) for param, here, anywhere in zip(awake, has, flags.tolist(), strict=True) if anywhere]
        for param, here in found:
            if not here:
                param.grad = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
        return [param for param, _ in found]

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """In place. What is small travels together; it is divided before it is added up, as in torch's DDP."""
        for bucket in _buckets(tensors):
            flat = bucket[0].view(-1) if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])
            flat.div_(self.count)
            dist.all_reduce(flat)
            if len(bucket) > 1:
                for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(mean.view_as(tensor))


def ranks_for(groups: Iterable[Group], before: Ranks, rounding: Rounding) -> Ranks:
    """Who serves these parameters: the one before, unless they are cut up among the processes since."""
    if not any(hasattr(param, "device_mesh") for group in groups for _, param in group.params):
        return before
    from lowrank_train.optim.sharded import Sharded  # with torch's sharded tensors, which one process need not load

    return before if isinstance(before, Sharded) else Sharded(rounding)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """In the order given, each of one dtype and of about BUCKET_BYTES, or of a single tensor."""
    buckets: list[list[Tensor]] = []
    room: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = room.setdefault(tensor.dtype, [])
        if not bucket:
            buckets.append(bucket)
        bucket.append(tensor)
        if sum(member.numel() for member in bucket) * tensor.element_size() >= BUCKET_BYTES:
            del room[tensor.dtype]
    return buckets
