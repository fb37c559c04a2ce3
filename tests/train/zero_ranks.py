"""What each of two ranks does: strategies on the flat shards of ZeRO, beside one process on all rows."""

from __future__ import annotations

import gc
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_train.config.schema import StrategyConfig
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.strategy import Strategy
from lowrank_train.train.zero_shards import ShardOptimizer
from lowrank_train.train.zero_weights import share_out_, whole_state_dict
from tests.test_strategies import Toy, small
from tests.two_processes import RANKS

UPDATES, SAVED, ROWS, MICRO_BATCHES, CLIP = 3, 2, 8, 2, 0.5


def built(settings: dict[str, Any]) -> tuple[Toy, TransformOptimizer]:
    """The toy under a strategy. Adam's eps is large, for a small gradient's rounding is not to become an update's."""
    torch.manual_seed(0)
    model, config = Toy(), small(StrategyConfig(**settings), storage=None)
    config.rest = config.rest | ({"eps": 1e-3} if "eps" in config.rest else {})
    strategy = Strategy.from_config(config, seed=1, steps=UPDATES)
    strategy.prepare(model)
    return model, strategy.optimizer(model, lr=1e-2, weight_decay=0.1, grad_clip=CLIP, micro_batches=MICRO_BATCHES)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def micro_batches(update: int) -> tuple[Tensor, ...]:
    return torch.randint(17, (ROWS, 9), generator=torch.Generator().manual_seed(update)).chunk(MICRO_BATCHES)


def alone(settings: dict[str, Any]) -> tuple[Toy, dict[str, Any]]:
    model, optimizer = built(settings)
    for update in range(UPDATES):
        optimizer.zero_grad()
        for rows in micro_batches(update):
            (loss_of(model, rows) / MICRO_BATCHES).backward()
        optimizer.step()
    return model, optimizer.state_dict()


class Shared:
    """The same under ZeRO."""

    def __init__(self, settings: dict[str, Any], stage: int, weights: dict[str, Tensor] | None = None) -> None:
        import deepspeed

        self.model, whole = built(settings)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.optimizer = ShardOptimizer.like(whole)
        buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": False}
        if stage == 3:
            buckets |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 1000}
        config = {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "contiguous_gradients": True, **buckets},
            "train_micro_batch_size_per_gpu": ROWS // RANKS // MICRO_BATCHES,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": CLIP,
        }
        if stage == 3:
            share_out_(self.model, self.model, config, torch.device("cpu"))
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            model_parameters=[param for param in self.model.parameters() if param.requires_grad],
            optimizer=self.optimizer,
            dist_init_required=False,
            config=config,
        )

    def weights(self) -> dict[str, Tensor]:
        """Of all ranks together."""
        everyones: list[Any] = [whole_state_dict(self.model) if self.engine.zero_optimization_stage() == 3 else {}]
        dist.broadcast_object_list(everyones, src=0)
        return everyones[0] or {key: value.clone() for key, value in self.model.state_dict().items()}

    def train(self, first: int, last: int) -> None:
        for update in range(first, last):
            for rows in micro_batches(update):
                self.engine.backward(loss_of(self.engine, rows.chunk(RANKS)[dist.get_rank()]))
                self.engine.step()


def difference(settings: dict[str, Any], stage: int) -> dict[str, Any]:
    """The largest between one process and two, in weights and state; and whether going on from a save is exact."""
    whole, expected = alone(settings)
    shared = Shared(settings, stage)
    shared.train(0, SAVED)
    weights = shared.weights()
    everyones: list[Any] = [shared.optimizer.state_dict()]
    dist.broadcast_object_list(everyones, src=0)
    shared.train(SAVED, UPDATES)
    again = Shared(settings, stage, weights)
    again.optimizer.load_state_dict(everyones[0])
    again.train(SAVED, UPDATES)
    found, later = shared.optimizer.state_dict(), again.optimizer.state_dict()
    own, resumed = shared.weights(), again.weights()
    pairs = [(value, own[key]) for key, value in whole.state_dict().items() if value.is_floating_point()]
    if dist.get_rank() == 0:
        assert found["state"].keys() == expected["state"].keys()
        assert [one["param_names"] for one in found["param_groups"]] == [
            one["param_names"] for one in expected["param_groups"]
        ]
        for number, state in expected["state"].items():
            assert state.keys() == found["state"][number].keys() and state.get("step") == found["state"][number].get(
                "step"
            )
            pairs += [(state[key], found["state"][number][key]) for key in state if key != "step"]
        same = all(
            torch.equal(value, later["state"][number][key])
            for number, state in found["state"].items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        )
    else:
        same = not found["state"]  # which the first rank has
    return {
        "stage": stage,
        "name": settings["name"],
        "difference": max(float((one - other).abs().max()) for one, other in pairs if one.numel()),
        "moved": any(not torch.equal(weights[key], own[key]) for key in own),
        "resumed": same and all(torch.equal(value, resumed[key]) for key, value in own.items()),
    }


def main(rank: int, cases: Sequence[tuple[int, dict[str, Any]]], folder: Path) -> None:
    """Stages with a strategy's settings; what is found of each goes into FOLDER/found0.json and found1.json."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # memory shared by ranks, by an extension that takes minutes to compile
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    found = []
    for stage, settings in cases:
        gc.freeze()  # DeepSpeed collects garbage for each engine, and would go through all that has been imported
        found.append(difference(settings, stage))
    (folder / f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
