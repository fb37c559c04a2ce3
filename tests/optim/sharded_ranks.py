"""What each of two ranks does: strategies for whole weights on parameters sharded by FSDP2, beside one process."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowrank_train.config import paths
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim import sharded
from lowrank_train.optim.activity import wake
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.owners import RowShards, rows_of
from lowrank_train.optim.sharded_state import whole_state_dict
from lowrank_train.strategy import Strategy
from tests.optim.bytes_by_rank import members_of, state_bytes_by_rank
from tests.optim.two_ranks import TINY, FewMatrices, storage
from tests.test_strategies import small
from tests.two_processes import RANKS
from tests.yeses import yeses

UPDATES, SAVED, ROWS = 5, 3, 8
POISONED = "model.layers.1.mlp.up_proj.weight"  # whose gradient is not finite in one of its rows
ROUND = 200  # numbers that several matrices may have to go in one round: a matrix here has 144 or more


@dataclass(frozen=True)
class Case:
    """A strategy, when it steps, micro-batches in an update, and which norm is clipped."""

    name: str
    when: str
    micro_batches: int = 1
    clip_norm_of: str | None = None
    rounding: Rounding | None = None  # of weights in bfloat16; None: float64
    storage: str | None = None  # of state, in place of the strategy's own

    def __str__(self) -> str:
        parts = (self.name, self.when, self.micro_batches, self.clip_norm_of, self.rounding, self.storage)
        return "-".join(str(part) for part in parts if part is not None)


def cases() -> Iterator[Case]:
    """Each strategy for whole weights that the support page has in rows: with accumulation and clipping after the
    backward pass, with accumulation where gradients are compressed inside it, and with whole updates inside it.
    Reparametrised layers are in two_ranks.py."""
    for name, when in yeses("fsdp"):
        text = (paths.CONF / "strategy" / f"{name}.yaml").read_text(encoding="utf-8")
        if re.search(r"^ *- weights:", text, flags=re.MULTILINE):
            continue
        projects = re.search(r"^ *- subspace:", text, flags=re.MULTILINE)
        clipped = "projected" if projects else "full"
        if when == "after_backward":
            yield Case(name, when, 2, clipped)
        elif when == "project_in_backward" and not re.search(r"^ *- feedback:", text, flags=re.MULTILINE):
            yield Case(name, when, 2)
        else:
            yield Case(name, when)
    for rounding in ("nearest", "stochastic", "compensated"):
        yield Case("galore", "after_backward", rounding=rounding)
    for kept in ("bf16", "q8", "q4"):
        yield Case("galore", "after_backward", 2, storage=kept)
        yield Case("galore", "project_in_backward", 2, storage=kept)


class Scaled(FewMatrices):
    """With a parameter of a single number, of which the second rank has none."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(12, 21, bias=False))
        self.set_submodule("model.layers.1.mlp.down_proj", nn.Linear(21, 12, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.gain


class Run:
    """A model, its strategy and its optimizer; sharded over two ranks or whole."""

    def __init__(self, case: Case, config: StrategyConfig, *, apart: bool) -> None:
        torch.manual_seed(0)
        self.case, self.apart = case, apart
        self.model = Scaled()
        self.model.to(torch.bfloat16 if case.rounding else torch.float64)
        config = small(config)
        if case.storage is not None:
            config.storage = storage(case.storage)
        elif config.storage is not None:
            config.storage = {**config.storage, **TINY}
        config.when = case.when  # type: ignore[assignment]
        self.strategy = Strategy.from_config(config, seed=1, steps=UPDATES, rounding=case.rounding or "nearest")
        self.strategy.prepare(self.model)
        self.optimizer: TransformOptimizer = self.strategy.optimizer(
            self.model,
            lr=1e-2,
            weight_decay=0.1,
            grad_clip=0.1 if case.clip_norm_of else None,
            clip_norm_of=case.clip_norm_of or "full",
            micro_batches=case.micro_batches,
            count_lost_updates=case.rounding is not None,
        )
        if apart:
            for param in self.model.parameters():
                wake(param)
            mesh = init_device_mesh("cpu", (RANKS,))
            for layer in self.model.model["layers"].children():
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self.strategy.regroup(self.model, self.optimizer)

    def train(self, first: int, last: int) -> list[dict[str, Any]]:
        """Updates number first to last - 1; what the optimizer says of each."""
        said = []
        for update in range(first, last):
            if update == SAVED:
                self.disturb()
            generator = torch.Generator().manual_seed(update)
            rows = torch.randint(17, (ROWS, 9), generator=generator)
            parts = rows.chunk(self.case.micro_batches)
            if self.apart and not self.case.rounding:  # the mean of the same in bfloat16 is the same
                parts = tuple(part.chunk(RANKS)[dist.get_rank()] for part in parts)
            self.optimizer.zero_grad()
            for part in parts[:-1]:
                self.backward(part)
            if self.apart and self.case.when == "project_in_backward" and len(parts) > 1:
                self.require_freed()
            self.optimizer.step(lambda: self.last_backward(parts[-1], update))  # noqa: B023 called at once
            said.append({name: value for name, value in self.optimizer.stats.items() if name != "refresh_sec"})
        return said

    def require_freed(self) -> None:
        """Between micro-batches the gradients that are left are those of no subspace, and of bases that are due."""
        left = []
        for tensor, rule in self.optimizer.transform_of.items():
            gradient = self.optimizer.ranks.parameter(tensor).grad
            if isinstance(gradient, DTensor):
                assert not rule.compresses or self.optimizer.ranks.is_due(self.optimizer, tensor)
                left.append(gradient.to_local())
        assert left and sum(g.untyped_storage().nbytes() for g in left) == sum(g.nbytes for g in left)
        assert not self.optimizer.ranks._gradients  # type: ignore[attr-defined]

    def disturb(self) -> None:
        """As events do: moments of one parameter are thinned out, those of another begin anew."""
        thinned, renewed = (self.model.get_parameter(n) for n in ("lm_head.weight", "model.layers.0.norm.weight"))
        rules = {self.optimizer.ranks.parameter(tensor): rule for tensor, rule in self.optimizer.transform_of.items()}
        if thinned in rules and rules[thinned].maskable:
            self.optimizer.mask(thinned, half)
        if renewed in rules and not rules[renewed].clocked:  # else when it is trained would begin anew with it
            self.optimizer.forget(renewed)

    def backward(self, part: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        (loss / self.case.micro_batches).backward()
        return loss

    def last_backward(self, part: Tensor, update: int) -> Tensor:
        loss = self.backward(part)
        gradient = self.model.get_parameter(POISONED).grad
        if update == 1 and gradient is not None:  # row 0 lies on one rank alone
            if not isinstance(gradient, DTensor):
                gradient[0, 0] = torch.inf
            elif dist.get_rank() == 0:
                gradient.to_local()[0, 0] = torch.inf
        return loss

    def weights(self) -> dict[str, Tensor]:
        """Whole, on every rank."""
        found = {name: param.detach() for name, param in self.model.named_parameters()}
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p.clone()) for name, p in found.items()}

    def rows(self) -> dict[str, Tensor]:
        """Of the weights, this rank's."""
        found = {name: param.detach() for name, param in self.model.named_parameters()}
        return {
            name: p.to_local() if isinstance(p, DTensor) else p[rows_of(len(p), dist.get_rank(), RANKS)]
            for name, p in found.items()
        }

    def state(self) -> dict[str, Any]:
        """As one process has it, on every rank."""
        return of_rank(0, whole_state_dict(self.optimizer)) if self.apart else self.optimizer.state_dict()

    def load(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        for name, param in self.model.named_parameters():
            value = weights[name]
            into = param.to_local() if isinstance(param, DTensor) else param
            with torch.no_grad():
                into.copy_(value[rows_of(len(value), dist.get_rank(), RANKS)] if self.apart else value)
        self.optimizer.load_state_dict(state)


def half(name: str, moment: Tensor) -> Tensor:
    """Zeros and ones, of the whole moment."""
    return (torch.rand(moment.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5).to(moment)


def of_rank(source: int, known: Any) -> Any:
    """What one rank knows, on every rank."""
    told = [known]
    dist.broadcast_object_list(told, src=source)
    return told[0]


def far(rows: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of weights in this rank's rows; it may have none of some."""
    return max(float((rows[name] - value).abs().max()) for name, value in expected.items() if value.numel())


def compared(case: Case, config: StrategyConfig, seen: list[int]) -> dict[str, Any]:
    """How far sharded runs end from one process in the rows of this rank, and what they keep and say.

    Rank 0 is the one process; rank 1 goes on alone from what both have saved.
    """
    first, begins_anew = dist.get_rank() == 0, case.when == "after_backward"
    apart = Run(case, config, apart=True)
    said = apart.train(0, SAVED)
    state, kept = apart.state(), sum(apart.optimizer.state_bytes().values())
    weights = apart.weights() if begins_anew else {}  # how it steps makes no difference to what is kept
    said += apart.train(SAVED, UPDATES)
    bytes_of_all: list[Any] = [None] * RANKS
    dist.all_gather_object(bytes_of_all, kept - apart.optimizer.state_bytes().get("shared", 0))
    found: dict[str, Any] = {"said": said, "state": described(state), "bytes": bytes_of_all}

    alone, saved, ended = Run(case, config, apart=False), None, None
    if first:
        counted = state_bytes_by_rank(members_of(alone.optimizer), RANKS, case.rounding or "nearest")
        said_alone = alone.train(0, SAVED)
        saved = (alone.weights(), deepcopy(alone.state()))
        said_alone += alone.train(SAVED, UPDATES)
        ended = alone.weights()
        found |= {"said alone": said_alone, "state alone": described(saved[1]), "counted": counted}
    elif begins_anew:
        alone.load(weights, state)
        alone.train(SAVED, UPDATES)
    saved, ended = of_rank(0, (saved, ended))
    length = max(float(value.abs().max()) for value in ended.values())
    expected = {name: value[rows_of(len(value), dist.get_rank(), RANKS)] for name, value in ended.items()}
    found["far 2"] = far(apart.rows(), expected) / length
    if begins_anew:
        again = Run(case, config, apart=True)
        again.load(*saved)
        again.train(SAVED, UPDATES)
        found["far 1 to 2"] = far(again.rows(), expected) / length
        if not first:
            found["far 2 to 1"] = far(alone.weights(), ended) / length
    return found | {"largest round": max(seen, default=0)}


def described(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Shapes, dtypes and integers of all state."""
    return {
        str(number): {
            key: [list(value.shape), str(value.dtype)] if isinstance(value, Tensor) else value
            for key, value in sorted(state.items())
        }
        for number, state in state_dict["state"].items()
    }


def main(rank: int, configs: dict[str, dict[str, Any]], folder: Path) -> None:
    """All cases, with the settings of their strategies; what is found goes into FOLDER/found0.json and found1.json."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    torch.set_num_threads(1)
    sharded.SMALL = ROUND
    seen: list[int] = []
    send = RowShards.to_owners

    def counting(self: RowShards, shards: list[Tensor], shapes: list[Size], owners: list[int]) -> dict[int, Tensor]:
        wholes = send(self, shards, shapes, owners)
        seen.append(sum(whole.numel() for whole in wholes.values()))
        return wholes

    RowShards.to_owners = counting  # type: ignore[method-assign,assignment]
    found = {}
    for case in cases():
        seen.clear()
        found[str(case)] = compared(case, StrategyConfig(**configs[case.name]), seen)
    (folder / f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
