"""Events between updates on layers that lie in shards: one layer at a time is whole on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowrank_train.nn.events import Event, Layerwise, Moments
from lowrank_train.nn.reparam import ReparamLinear
from lowrank_train.optim.activity import is_trainable
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.owners import rows_of
from lowrank_train.train.sharding import gather_no_more


def whole_one_by_one(
    model: nn.Module, optimizer: TransformOptimizer, equalize: Callable[[nn.Module], None]
) -> Layerwise:
    """How Strategy.run_events() goes through the layers of a model in shards, on all ranks alike.

    `equalize` gives every rank the first one's numbers of a layer after an event that is not quiet.
    """

    def parts(
        event: Event, layers: Mapping[str, ReparamLinear], moments: Moments
    ) -> Iterator[tuple[Mapping[str, ReparamLinear], Moments]]:
        if event.together:
            yield layers, moments
            return
        gather_no_more(model)
        for name, layer in layers.items():
            with made_whole(layer, optimizer, of_trained=event.of_trained) as of_whole:
                yield {name: layer}, of_whole
                if not event.quiet:
                    equalize(layer)

    return parts


@contextmanager
@torch.no_grad()
def made_whole(layer: nn.Module, optimizer: TransformOptimizer, *, of_trained: bool = False) -> Iterator[Moments]:
    """Plain parameters in place of the shards of a layer, whose rows take over what has become of them.

    Yields what reaches the moments of the shards by the whole parameters. of_trained: the others stay as they are.
    """
    held: list[tuple[nn.Module, str, DTensor]] = []
    wholes: dict[DTensor, nn.Parameter] = {}
    versions: dict[DTensor, int] = {}
    for module in layer.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(param, DTensor) and (is_trainable(param) or not of_trained):
                if param not in wholes:
                    wholes[param] = nn.Parameter(param.full_tensor().clone(), requires_grad=param.requires_grad)
                    versions[param] = wholes[param]._version
                held.append((module, name, param))
                module._parameters[name] = wholes[param]
    try:
        yield _MomentsOfWhole(optimizer, {whole: param for param, whole in wholes.items()})
    finally:
        for module, name, shard in held:
            module._parameters[name] = cast(nn.Parameter, shard)
        for shard, whole in wholes.items():
            mesh = shard.device_mesh
            shard.to_local().data.copy_(whole.detach()[rows_of(len(whole), mesh.get_local_rank(), mesh.size())])
            if whole._version != versions[shard]:
                optimizer.rounded_weights.renew(optimizer.ranks.served(shard))


@dataclass(frozen=True)
class _MomentsOfWhole:
    """`moments` of shards, asked for by the whole parameters that stand for them now."""

    moments: Moments
    shard_of: Mapping[Tensor, DTensor]

    def forget(self, param: Tensor) -> None:
        self.moments.forget(self.shard_of.get(param, param))  # type: ignore[arg-type]

    def mask(self, param: Tensor, keep: Callable[[str, Tensor], Tensor]) -> None:
        self.moments.mask(self.shard_of.get(param, param), keep)  # type: ignore[arg-type]

    def lr(self, param: Tensor) -> float:
        return self.moments.lr(self.shard_of.get(param, param))  # type: ignore[arg-type]
