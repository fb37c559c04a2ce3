"""The table of methods: one row here buys a method every shared test of the optimizer wing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.config.schema import StrategyConfig
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.strategy import Strategy

ADAM = {"_target_": "lowrank_train.optim.moments.Adam", "eps": 1e-6, "eps_inside": False, "weight_decay_first": False}
BACKPROJECT = {"_target_": "lowrank_train.optim.lift.Backproject", "scale": 0.25}


def subspace(name: str, **arguments: Any) -> dict[str, Any]:
    target = {"svd": "svd.Svd", "randomized": "randomized.Randomized"}[name]
    return {"_target_": f"lowrank_train.optim.subspace.{target}", "rank": 3, "every": 4} | arguments


@dataclass(frozen=True)
class Method:
    """One row: how to configure it, and what it cannot do."""

    name: str
    config: Callable[[], StrategyConfig]
    projects: bool = True  # has a subspace, so the projection can run inside the backward pass

    def __str__(self) -> str:
        return self.name


def in_subspace(**changes: Any) -> Callable[[], StrategyConfig]:
    def config() -> StrategyConfig:
        settings = {"subspace": subspace("svd"), "inner": ADAM, "lift": BACKPROJECT, "rest": ADAM} | changes
        return StrategyConfig(name="galore", select=["*.weight"], **settings)

    return config


METHODS = [
    Method("full", lambda: StrategyConfig(name="full", rest={"_target_": ADAM["_target_"]}), projects=False),
    Method("galore", in_subspace()),
    Method("galore-reset", in_subspace(on_refresh="reset")),
    Method("galore-reverse", in_subspace(subspace=subspace("svd", side="reverse_std"))),
    Method("galore-both-sides", in_subspace(subspace=subspace("svd", side="full"))),
    Method("galore-randomized", in_subspace(subspace=subspace("randomized"))),
    Method("galore-staggered", in_subspace(subspace=subspace("randomized", stagger=True))),
]


def toy_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Tall, wide, square and odd matrices, with biases."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 7)]
    return nn.Sequential(*layers).to(dtype)


def toy_batch(update: int, rows: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    inputs = torch.randn(rows, 12, generator=generator)
    return inputs.to(dtype), inputs[:, :7].sin().to(dtype)


def optimizer_of(
    config: StrategyConfig, model: nn.Module, *, when: Any = "after_backward", lr: float = 1e-2, **arguments: Any
) -> TransformOptimizer:
    config.when = when
    strategy = Strategy.from_config(config, seed=7)
    strategy.prepare(model)
    return strategy.optimizer(model, lr=lr, **arguments)


def run_update(model: nn.Module, optimizer: TransformOptimizer, update: int, micro_batches: int = 1) -> None:
    """One update as Lightning makes it: all micro-batches but the last outside step(), the last in its closure."""
    inputs, targets = toy_batch(update)
    parts = list(zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True))

    def backward(part: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(model(part[0]), part[1]) / micro_batches
        loss.backward()
        return loss

    optimizer.zero_grad()
    for part in parts[:-1]:
        backward(part)
    optimizer.step(lambda: backward(parts[-1]))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])
