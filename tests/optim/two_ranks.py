"""Run as a program, twice: strategies in every moment of stepping on two ranks, beside one process on all rows."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_train.config import paths
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.nn.reparam import dense_state_dict
from lowrank_train.optim.blocks import Blocks
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.ranks import Averaged, Ranks, Together
from lowrank_train.strategy import Strategy
from lowrank_train.train.events import equalize_layers
from tests.test_strategies import MOMENTS, STRATEGIES, Toy, configured, small

UPDATES, ROWS, RANKS = 4, 8, 2
# Parallel heads see other rows on two ranks than on one; their own test is in tests/train/test_rank_local.py.
LEFT_OUT = {"lte"}
EARLY = {"shrink_every": 2, "guided_steps": 2, "mask_change_every": 2, "evaluate_every": 1, "latest_steps": 3,
         "iteration_steps": 2, "every": 2, "dropout": 0.0}  # fmt: skip
"""So that events fall into the updates; and each rank would drop other numbers."""


@dataclass(frozen=True)
class Case:
    """A strategy, when it steps, what is averaged by the optimizer, and micro-batches in an update."""

    name: str
    when: str
    averaged: Averaged
    micro_batches: int

    def __str__(self) -> str:
        return f"{self.name}-{self.when}-{self.averaged}"


def settings(name: str) -> StrategyConfig:
    """Of the toy's size, with events within the updates."""
    config = small(configured(name))
    for axis in ("weights", "merge"):
        part = getattr(config, axis)
        if part:
            early = {key: value for key, value in EARLY.items() if part.get(key) is not None}
            early |= {"warm_start_steps": 2} if name == "lora" else {}
            setattr(config, axis, {**part, **early})
    return config


def gains_by_projecting(rule: InSubspace) -> bool:
    """Whether trainer.reduce=projected is not refused."""
    return rule.accumulates and not rule.needs_gradient and not rule.subspace.always_moves


def cases() -> Iterator[Case]:
    """Where the optimizer averages or moves bases; beside a wrapped model and plain rules there is nothing of ours."""
    for name in STRATEGIES:
        if name in LEFT_OUT:
            continue
        text = (paths.CONF / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
        offered = re.search(r"^when: .*", text, flags=re.MULTILINE)
        assert offered
        config = settings(name)
        strategy = Strategy.from_config(config, steps=UPDATES)
        rule = strategy.selected.rule if isinstance(strategy.selected, Blocks) else strategy.selected
        changing = bool(config.blocks) or any(event.restructures for event in strategy.events)
        for when in MOMENTS:
            if when not in offered[0]:
                continue
            accumulates = when == "after_backward" or (when == "project_in_backward" and config.feedback is None)
            parts = 2 if accumulates else 1
            if when == "after_backward" and isinstance(rule, InSubspace) and not config.blocks:
                yield Case(name, when, "before", parts)
            if when != "after_backward" or changing:
                yield Case(name, when, "gradients", parts)
            if isinstance(rule, InSubspace) and gains_by_projecting(rule):
                yield Case(name, when, "projected", parts)


def trained(case: Case, ranks: Ranks, rank: int) -> tuple[dict[str, Tensor], str]:
    """The dense weights after some updates on this rank's rows; whether events changed what is trained, if any do."""
    torch.manual_seed(0)
    model = Toy().double()
    config = settings(case.name)
    config.when = case.when  # type: ignore[assignment]
    strategy = Strategy.from_config(config, seed=1, steps=UPDATES)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=1e-3, weight_decay=0.1, micro_batches=case.micro_batches)
    optimizer.ranks = ranks
    wrapped = ranks.count > 1 and case.averaged == "before"
    module: Any = DistributedDataParallel(model) if wrapped else model
    restructured = "not at all" if any(event.restructures for event in strategy.events) else ""
    for update in range(UPDATES):
        generator = torch.Generator().manual_seed(update)
        rows = torch.randint(17, (ROWS, 9), generator=generator).chunk(ranks.count)[rank]
        parts = rows.chunk(case.micro_batches)

        def backward(part: Tensor) -> Tensor:
            loss = nn.functional.cross_entropy(module(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            (loss / case.micro_batches).backward()
            return loss

        optimizer.zero_grad()
        with module.no_sync() if wrapped else contextlib.nullcontext():
            for part in parts[:-1]:
                backward(part)
        optimizer.step(lambda: backward(parts[-1]))  # noqa: B023 called at once
        happened = strategy.run_events(update + 1, model, optimizer)
        if any(event.restructures for event in happened):
            restructured = "as told"
        if ranks.count > 1 and any(event.restructures or not event.quiet for event in happened):
            equalize_layers(model)
    return dense_state_dict(model), restructured


def compared(case: Case, rank: int, alone: dict[str, Tensor] | None) -> dict[str, Any]:
    """How far two ranks end from each other, and from one process relative to the length of its way."""
    together, restructured = trained(case, Together(case.averaged), rank)
    apart = 0.0
    for value in together.values():
        others = [torch.empty_like(value) for _ in range(RANKS)]
        dist.all_gather(others, value.contiguous())
        apart = max(apart, float((others[0] - others[1]).abs().max()))
    found: dict[str, Any] = {"apart": apart, "restructured": restructured}
    if alone is not None:
        torch.manual_seed(0)
        start = Toy().double().state_dict()
        way = max(float((alone[name] - start[name]).abs().max()) for name in alone)
        found["far"] = max(float((together[name] - alone[name]).abs().max()) for name in alone) / way
    return found


def main(rank: int, folder: Path) -> None:
    everything = list(cases())
    names = list(dict.fromkeys(case.name for case in everything))
    # The ranks share out the references, and make them before they meet: some layers speak to the other ranks too. All
    # moments of stepping give the same weights.
    alone = {name: trained(Case(name, "after_backward", "before", 1), Ranks(), 0)[0] for name in names[rank::RANKS]}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    found = {str(case): compared(case, rank, alone.get(case.name)) for case in everything}
    (folder / f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
