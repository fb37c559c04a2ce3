"""What each of two ranks does: every yes of the support page on two ranks, beside one process on all rows.

Strategies for whole weights under FSDP2 have sharded_ranks.py, which sees more of their state.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_train.config import paths
from lowrank_train.config.files import load_container
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.nn.events import Layerwise, at_once
from lowrank_train.nn.reparam import dense_state_dict
from lowrank_train.optim.ranks import Averaged, Together
from lowrank_train.strategy import Strategy
from lowrank_train.train.events import equalize_layers
from lowrank_train.train.sharding import gather_no_more, shard_
from lowrank_train.train.whole_layers import whole_one_by_one
from tests.test_strategies import Toy, small
from tests.two_processes import RANKS
from tests.yeses import yeses

UPDATES, ROWS = 4, 8
WARM = "lora after dense updates"  # beside what the page has, for the parameters that come in the middle
STORED = {f"{name} in {kept}": (name, kept) for name in ("galore", "lora") for kept in ("bf16", "q8", "q4")}
CODED = "galore in int8"  # weights too
"""Strategies whose state is kept otherwise; galore's under FSDP2 is in sharded_ranks.py."""
EARLY = {"shrink_every": 2, "guided_steps": 2, "mask_change_every": 2, "evaluate_every": 1, "latest_steps": 3,
         "iteration_steps": 2, "every": 2, "dropout": 0.0}  # fmt: skip
"""So that events fall into the updates; and each rank would drop other numbers."""
TINY = {"min_elements": 16, "block": 32, "block_q4": 32}


class FewMatrices(Toy):
    """The toy with no more than is needed: alike matrices in two layers, square, tall and wide ones, and a norm.

    Each parameter is some messages between processes in each update.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second = self.model["layers"].children()
        for layer, unneeded in (
            (first, "self_attn.o_proj mlp.up_proj mlp.down_proj"),
            (second, "self_attn.o_proj norm"),
        ):
            for name in unneeded.split():
                layer.set_submodule(name, nn.Identity())


@dataclass(frozen=True)
class Case:
    """A strategy, when it steps, how the ranks share the work, and micro-batches in an update."""

    name: str
    when: str
    shared: Averaged | Literal["sharded"]  # where gradients of whole weights are averaged, or rows of the weights
    micro_batches: int

    def __str__(self) -> str:
        return f"{self.name}-{self.when}-{self.shared}"


def settings(name: str, config: StrategyConfig) -> StrategyConfig:
    """Of the toy's size, with events within the updates."""
    config = small(config)
    if name in STORED:
        config = replace(config, storage=storage(STORED[name][1]))
    for axis in ("weights", "merge"):
        part = getattr(config, axis)
        if part:
            early = {key: value for key, value in EARLY.items() if part.get(key) is not None}
            early |= {"warm_start_steps": 2} if name == WARM else {}
            setattr(config, axis, {**part, **early})
    return config


def storage(name: str) -> dict[str, Any]:
    """A storage of state that takes in tensors as small as the toy's."""
    return load_container(paths.CONF / "strategy" / "storage" / f"{name}.yaml") | TINY


def cases(configs: Mapping[str, StrategyConfig]) -> Iterator[Case]:
    """One for each yes. torch averages gradients where it can, the optimizer where that is too late."""
    for name, when in yeses("ddp"):
        config = configs[name]
        events = Strategy.from_config(config, steps=UPDATES).events
        changing = config.blocks or any(event.restructures for event in events)
        by_torch = when == "after_backward" and not changing
        yield Case(name, when, "before" if by_torch else "gradients", parts_of_batch(config, when))
    for when in ("after_backward", "in_backward"):
        yield Case(WARM, when, "gradients", parts_of_batch(configs[WARM], when))
    for name, when in yeses("ddp_projected"):
        yield Case(name, when, "projected", parts_of_batch(configs[name], when))
    for name in (*STORED, CODED):
        yield Case(name, "after_backward", "gradients", 2)
        yield Case(name, "after_backward", "projected" if configs[name].subspace else "sharded", 2)
    for name, when in yeses("fsdp"):
        if configs[name].weights:
            yield Case(name, when, "sharded", parts_of_batch(configs[name], when))


def parts_of_batch(config: StrategyConfig, when: str) -> int:
    """Micro-batches in an update: two where gradients may be added up."""
    return 2 if when == "after_backward" or (when == "project_in_backward" and config.feedback is None) else 1


def trained(case: Case, config: StrategyConfig, count: int = 1, rank: int = 0) -> tuple[dict[str, Tensor], str]:
    """The dense weights after some updates on this rank's rows; whether events changed what is trained, if any do."""
    torch.manual_seed(0)
    model = FewMatrices().double()
    config = replace(config, when=case.when)  # type: ignore[arg-type]
    strategy = Strategy.from_config(config, seed=1, steps=UPDATES, int8_group=16 if case.name == CODED else None)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=1e-3, weight_decay=0.1, micro_batches=case.micro_batches)
    wrapped = False
    layerwise: Layerwise = at_once
    module: Any = model
    if count > 1 and case.shared != "sharded":
        optimizer.ranks = Together(case.shared)
        wrapped = case.shared == "before"
        module = DistributedDataParallel(model, broadcast_buffers=False) if wrapped else model
    elif count > 1:
        shard_(model, init_device_mesh("cpu", (count,)), autocast=False)
        strategy.regroup(model, optimizer)
        layerwise = whole_one_by_one(model, optimizer, equalize_layers)
    restructured = "not at all" if any(event.restructures for event in strategy.events) else ""
    for update in range(UPDATES):
        generator = torch.Generator().manual_seed(update)
        rows = torch.randint(17, (ROWS, 9), generator=generator)[rank::count]
        # Every other row, so that a parallel head, which sees a share of the rows in a row, sees its own anywhere.
        parts = [rows[part :: case.micro_batches] for part in range(case.micro_batches)]

        def backward(part: Tensor) -> Tensor:
            loss = nn.functional.cross_entropy(module(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            (loss / case.micro_batches).backward()
            return loss

        optimizer.zero_grad()
        with module.no_sync() if wrapped else contextlib.nullcontext():
            for part in parts[:-1]:
                backward(part)
        optimizer.step(lambda: backward(parts[-1]))  # noqa: B023 called at once
        happened = strategy.run_events(update + 1, model, optimizer, layerwise)
        if any(event.restructures for event in happened):
            restructured = "as told"
        if layerwise is at_once and count > 1 and any(event.restructures or not event.quiet for event in happened):
            equalize_layers(model)
    if layerwise is not at_once:
        make_whole(model)
    return dense_state_dict(model), restructured


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """Plain parameters in place of sharded ones, for good."""
    gather_no_more(model)
    wholes: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            assert isinstance(param, DTensor)
            if param not in wholes:
                wholes[param] = nn.Parameter(param.full_tensor(), requires_grad=param.requires_grad)
            module._parameters[name] = wholes[param]


def compared(case: Case, config: StrategyConfig, rank: int, alone: dict[str, Tensor] | None) -> dict[str, Any]:
    """How far two ranks end from each other, and from one process relative to the length of its way."""
    together, restructured = trained(case, config, RANKS, rank)
    ends = torch.cat([value.flatten() for value in together.values()])
    of_all = [torch.empty_like(ends) for _ in range(RANKS)]
    dist.all_gather(of_all, ends)
    found: dict[str, Any] = {"apart": float((of_all[0] - of_all[1]).abs().max()), "restructured": restructured}
    if alone is not None:
        torch.manual_seed(0)
        start = FewMatrices().double().state_dict()
        way = max(float((alone[name] - start[name]).abs().max()) for name in alone)
        found["far"] = max(float((together[name] - alone[name]).abs().max()) for name in alone) / way
    return found


def main(rank: int, written: dict[str, dict[str, Any]], folder: Path) -> None:
    """All cases, with the settings of their strategies; what is found goes into FOLDER/found0.json and found1.json."""
    written |= {WARM: written["lora"], CODED: written["galore"]}
    written |= {stored: written[name] for stored, (name, _) in STORED.items()}
    configs = {name: settings(name, StrategyConfig(**config)) for name, config in written.items()}
    # The ranks share out the references, and make them before they meet: some layers speak to the other ranks too. All
    # moments of stepping give the same weights.
    alone = {
        name: trained(Case(name, "after_backward", "before", 1), configs[name])[0]
        for name in list(configs)[rank::RANKS]
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    found = {str(case): compared(case, configs[case.name], rank, alone.get(case.name)) for case in cases(configs)}
    (folder / f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
