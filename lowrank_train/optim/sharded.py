"""Parameters cut into rows over the processes, as FSDP2 has them: served where they lie, or whole by one owner each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.groups import Group
from lowrank_train.optim.owners import RowShards, owner_of_each
from lowrank_train.optim.ranks import Ready, Together
from lowrank_train.optim.sharded_state import Part
from lowrank_train.optim.together import SMALL
from lowrank_train.optim.transform import State, Transform
from lowrank_train.optim.update_stats import norm, total_norm

if TYPE_CHECKING:
    from lowrank_train.optim.optimizer import TransformOptimizer


class Sharded(Together):
    """Every process holds some rows of each parameter, and of its gradient, which is the mean over all already.

    Where a rule treats rows apart, each rank serves its own: state is cut as the weights are, the basis of a subspace
    is the same everywhere, and nothing is sent but the whole gradient to one rank when a basis moves, and the basis
    back. All other matrices have one owner each, which alone keeps their state. They go in rounds of one to each
    rank: the shards of gradient and weights to the owner, which makes the update, and the weights back.

    Compressed in the backward pass, rows go where they lie, and matrices with an owner there, in every micro-batch.
    """

    gradients_share_memory = True  # those of a unit of layers are views of what was received together

    def __init__(self, rounding: Rounding) -> None:
        super().__init__("before")
        self._rounding: Rounding = rounding
        self._shards = RowShards()
        self._parts: dict[Tensor, Part] = {}
        self._served: dict[Tensor, Tensor] = {}
        self._gradients: dict[Tensor, Tensor] = {}  # the shards of what has an owner
        self._due: set[Tensor] | None = None  # what has an owner whose basis moves next; None: not asked for yet
        self._moves_of_owned = [0, 0, 0]  # here: bases that moved, that stayed, fallbacks
        self._device = torch.device("cpu")

    def take_in(self, groups: list[Group]) -> list[Group]:
        members = [
            (param, slot, group.transform)
            for group in groups
            for (_, param), slot in zip(group.params, group.slots, strict=True)
        ]
        for param, slot, _ in members:
            self._check(param, slot.name)
        gone = self._served.keys() - {param for param, _, _ in members}
        for param in gone:
            del self._parts[self._served.pop(param)]
        new = [member for member in members if member[0] not in self._served]
        for (param, _, _), owner in zip(new, owner_of_each(new, self.count, self._rounding), strict=True):
            assert isinstance(param, DTensor)
            self._begin(param, owner)
        return [
            replace(group, params=[(name, self._served[param]) for name, param in group.params]) for group in groups
        ]

    @torch.no_grad()
    def _begin(self, param: DTensor, owner: int | None) -> None:
        shard = param.to_local().detach()
        self._device = shard.device
        like = torch.empty((), dtype=param.dtype, device=shard.device).expand(param.shape)
        if owner is None:
            tensor = shard
        elif owner == self.rank:
            tensor = like.detach()
        else:
            like = torch.empty(param.shape, dtype=param.dtype, device="meta")
            tensor = like.detach()
        self._served[param] = tensor
        self._parts[tensor] = Part(param, owner, like)

    def _check(self, param: Tensor, name: str) -> None:
        if not isinstance(param, DTensor):
            raise ValueError(f"{name} is whole on every process, while other parameters are sharded; shard all or none")
        if param.device_mesh.size() != self.count or param.placements != (Shard(0),):
            raise ValueError(f"{name} is placed {param.placements} on {param.device_mesh}; it must be cut into rows")

    def served(self, param: Tensor) -> Tensor:
        return self._served.get(param, param)

    def parameter(self, tensor: Tensor) -> Tensor:
        return self._parts[tensor].param

    def like(self, tensor: Tensor) -> Tensor:
        return self._parts[tensor].like

    def is_here(self, tensor: Tensor) -> bool:
        return self._parts[tensor].owner is None

    def is_kept(self, tensor: Tensor) -> bool:
        return self._parts[tensor].is_kept

    def keep_own(self, tensor: Tensor, rule: Transform, state: State) -> None:
        self._parts[tensor].keep_own(rule, state)

    def as_saved(self, tensor: Tensor, rule: Transform, state: State) -> State:
        return self._parts[tensor].as_saved(rule, state)

    def from_saved(self, tensor: Tensor, rule: Transform, state: State) -> State:
        return self._parts[tensor].from_saved(rule, state)

    def masking(
        self, tensor: Tensor, rule: Transform, state: State, keep: Callable[[str, Tensor], Tensor]
    ) -> Callable[[str, Tensor], Tensor]:
        return self._parts[tensor].masking(keep)

    def make_common(self, optimizer: TransformOptimizer) -> None:
        for param, _ in optimizer._awake():
            self.make_one_common(optimizer, param)

    def make_one_common(self, optimizer: TransformOptimizer, param: Tensor) -> None:
        """Hand the gradient over; what has an owner gets a token until its round."""
        part = self._parts[param]
        if part.param.grad is None:
            return
        gradient = part.param.grad
        assert isinstance(gradient, DTensor)
        if part.owner is None:
            param.data = part.shard  # which FSDP may have put elsewhere since
            param.grad = gradient.to_local()
        else:
            self._gradients[param] = gradient.to_local()
            param.grad = part.like
        part.param.grad = None

    def is_due(self, optimizer: TransformOptimizer, tensor: Tensor) -> bool:
        if self.is_here(tensor):
            return super().is_due(optimizer, tensor)
        if self._due is None:
            owned = [param for param, part in self._parts.items() if part.owner is not None]
            mine = [self._parts[one].is_kept and super(Sharded, self).is_due(optimizer, one) for one in owned]
            told = torch.tensor(mine, dtype=torch.int32, device=self._device)
            dist.all_reduce(told)
            self._due = {param for param, due in zip(owned, told.tolist(), strict=True) if due}
        return tensor in self._due

    def set_apart(self, tensor: Tensor) -> None:
        param = self._parts[tensor].param
        assert isinstance(param.grad, DTensor)
        local = param.grad.to_local()
        if local.untyped_storage().nbytes() > local.nbytes:
            param.grad = DTensor.from_local(
                local.clone(), param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
            )

    def norms(self, optimizer: TransformOptimizer, tensors: list[Tensor]) -> list[Tensor]:
        here = [self._gradients.get(tensor, tensor.grad) for tensor in tensors]
        squares = torch.stack([norm(shard).double().square() for shard in here if shard is not None])
        dist.all_reduce(squares)
        return list(squares.sqrt().unbind())

    def total_low_norm(self, optimizer: TransformOptimizer) -> float:
        stats = optimizer._current
        (square,) = self._summed([self._low_square(optimizer)])
        return math.sqrt(square + total_norm(self._uncompressed(optimizer, stats.norms)) ** 2)

    def finish(self, optimizer: TransformOptimizer) -> None:
        """What was measured and counted, over all ranks."""
        stats = optimizer._current
        lost = sum(int(number) for number in stats.lost)
        mine = [self._low_square(optimizer), lost, stats.counted_weights, *self._moves_of_owned]
        square, lost_anywhere, counted, *moves = self._summed(mine)
        compressed = torch.tensor(square, dtype=torch.float64, device=self._device).sqrt()
        stats.low_norms = self._uncompressed(optimizer, stats.norms) | {"": compressed}
        stats.lost = [torch.tensor(lost_anywhere)] if counted else []
        stats.counted_weights = int(counted)
        stats.count_moves([int(of_all) - own for of_all, own in zip(moves, self._moves_of_owned, strict=True)])
        self._moves_of_owned = [0, 0, 0]
        self._gradients.clear()
        self._due = None

    def _low_square(self, optimizer: TransformOptimizer) -> float:
        """Of what this rank has compressed: rows, and matrices that it owns."""
        low_norms = optimizer._current.low_norms
        others = self._uncompressed(optimizer, low_norms)
        return total_norm({name: value for name, value in low_norms.items() if name not in others}) ** 2

    def _uncompressed(self, optimizer: TransformOptimizer, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of rules that do not compress, whose small gradient is the gradient."""
        pairs = ((optimizer.slots[param].name, rule) for param, rule in optimizer.transform_of.items())
        return {name: norms[name] for name, rule in pairs if name in norms and not rule.compresses}

    def _summed(self, numbers: list[float]) -> list[float]:
        summed = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return summed.tolist()

    def free_gradients(self) -> None:
        self._gradients.clear()
        self._due = None
        for part in self._parts.values():
            part.param.grad = None

    def in_rounds(
        self, optimizer: TransformOptimizer, ready: Ready, grad_factor: float = 1.0, *, updating: bool = True
    ) -> Iterator[Any]:
        owned: list[tuple[Tensor, dict[str, Any]]] = []

        def apart() -> Iterator[tuple[Tensor, dict[str, Any]]]:
            for param, group in ready:
                if self.is_here(param):
                    yield param, group
                elif updating or optimizer.transform_of[param].compresses:
                    owned.append((param, group))

        yield from super().in_rounds(optimizer, apart(), grad_factor, updating=updating)
        groups = dict(owned)
        for params in self._rounds(list(groups)):
            yield from self._round(optimizer, params, groups, updating)

    def _rounds(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """One matrix for each owner at a time, or several small ones, all of one dtype; the largest first."""
        for dtype in dict.fromkeys(param.dtype for param in params):
            alike = [param for param in params if param.dtype is dtype]
            alike.sort(key=lambda param: -self._parts[param].shape.numel())
            queues = [[param for param in alike if self._parts[param].owner == rank] for rank in range(self.count)]
            while any(queues):
                together = []
                for queue in queues:
                    numel = 0
                    while queue and (not numel or numel + queue[0].numel() <= SMALL):
                        numel += queue[0].numel()
                        together.append(queue.pop(0))
                yield together

    def _round(
        self, optimizer: TransformOptimizer, params: list[Tensor], groups: dict[Tensor, Any], updating: bool
    ) -> Iterator[Any]:
        """These parameters, whole, on their owners; their weights go back into the shards if they are `updating`."""
        rules = optimizer.transform_of
        lacking = [param for param in params if param in self._gradients]  # else their owners have compressed them
        gradients = self._to_owners(lacking, [self._gradients[param] for param in lacking])
        weights = self._to_owners(params, [self._parts[param].shard for param in params]) if updating else {}
        for param in params:
            if updating or not rules[param].needs_gradient:
                self._gradients.pop(param, None)
            if self._parts[param].owner == self.rank:
                param.data = weights.get(param, param.data)
                param.grad = gradients.pop(param, None)
                before = optimizer._current.moves()
                yield param, groups[param]
                after = optimizer._current.moves()
                self._moves_of_owned = [
                    sum_ + new - old for sum_, new, old in zip(self._moves_of_owned, after, before, strict=True)
                ]
        if updating:
            shapes, owners = [self._parts[param].shape for param in params], [self._owner(param) for param in params]
            wholes = {place: param.data for place, param in enumerate(params) if param in weights}
            self._shards.from_owners(wholes, [self._parts[param].shard for param in params], shapes, owners)
        for param in params:
            like = self._parts[param].like
            param.grad = None
            param.data = like
            param.grad = None if updating else like

    def _owner(self, param: Tensor) -> int:
        owner = self._parts[param].owner
        assert owner is not None
        return owner

    def _to_owners(self, params: Sequence[Tensor], shards: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        if not params:
            return {}
        shapes, owners = [self._parts[param].shape for param in params], [self._owner(param) for param in params]
        return {params[place]: whole for place, whole in self._shards.to_owners(shards, shapes, owners).items()}

    def _moves_by_one(self, optimizer: TransformOptimizer, param: Tensor) -> bool:
        """Wherever a basis is due: no rank has the whole gradient that it moves by."""
        rule = optimizer.transform_of[param]
        return rule.compresses and param.grad is not None and rule.refresh_due(optimizer._state(param))

    def _whole_gradients(self, params: Sequence[Tensor], owners: Sequence[int]) -> dict[Tensor, Tensor]:
        found: dict[Tensor, Tensor] = {}
        for dtype in dict.fromkeys(param.dtype for param in params):
            alike = [place for place, param in enumerate(params) if param.dtype is dtype]
            shards = [params[place].grad for place in alike]
            shapes = [self._parts[params[place]].shape for place in alike]
            wholes = self._shards.to_owners(
                [shard for shard in shards if shard is not None], shapes, [owners[place] for place in alike]
            )
            found |= {params[alike[i]]: whole for i, whole in wholes.items()}
        return found
