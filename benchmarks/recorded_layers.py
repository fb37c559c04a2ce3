"""Recorded end-to-end runs of reparametrised layers: their initial tensors, their draws at merges, their schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_train import reparametrise, schedule
from lowrank_train.nn.reparam import ReparamLinear, layers_of
from lowrank_train.optim.schedule import multiplier

METHODS = ("lora", "relora", "sltrain", "lowrank")
NOT_OPTIONS = ("init", "lora_A_init", "trainable", "restart_warmup_steps", "reset", "reinit", "lora_only")


@dataclass
class Prepared:
    """A model with its layers swapped, its optimizer, and what follows an update."""

    optimizer: torch.optim.Optimizer
    after: Callable[[int], None]  # the number of the update, counted from 1
    factor: Callable[[int], float]  # multiplier of the learning rate of the update after so many


def prepare(model: nn.Module, method: str, settings: dict[str, Any], *, published: bool) -> Prepared:
    """As recorded, with the recorded draws; or with our own, and our own merges and schedule."""
    options = {key: value for key, value in settings["method_args"].items() if key not in NOT_OPTIONS}
    dead = settings["method_args"].get("lora_A_init", "").startswith("zeros")
    if dead and published:
        options["init"] = "zero"
    elif method == "relora" and published:
        options["init"] = "kaiming"
    if method == "lowrank":  # the recorded layer is LoRA without its frozen matrix, scaled by alpha / rank = 1
        assert options.pop("lora_alpha") == options["r"] and options.pop("lora_dropout") == 0
        options |= {"init": "zero_b"} if published else {}
    strategy = reparametrise(model, method, modules=["self_attn", "mlp"], published=published, **options)
    layers = layers_of(model)
    if published and not dead:
        load_initial(layers, method)
    optimizer = strategy.optimizer(model, lr=settings["lr"])
    reinitial = np.random.default_rng(2026)

    def after(update: int) -> None:
        merged = any(event.name == "merge" for event in strategy.run_events(update, model, optimizer))
        if merged and published:
            for layer in layers.values():
                put(layer, "A", uniform(reinitial, tuple(layer.A.shape)))  # type: ignore[arg-type]

    return Prepared(optimizer, after, factor_of(settings["schedule"], published=published))


def factor_of(recorded: dict[str, Any], *, published: bool) -> Callable[[int], float]:
    """The recorded schedule, or ours of the same name."""
    if published and recorded["scheduler_type"] == "cosine_restarts":
        return schedule(repo="relora", **recorded)
    return lambda update: multiplier(
        recorded["scheduler_type"],
        update,
        warmup_steps=recorded["warmup_steps"],
        steps=recorded["num_training_steps"],
        min_lr_ratio=recorded["min_lr_ratio"],
        cycle_steps=recorded.get("cycle_length"),
        restart_warmup_steps=recorded.get("restart_warmup_steps", 0),
    )


def load_initial(layers: dict[str, ReparamLinear], method: str) -> None:
    """The recorded start: layers in the order of their names; A, then for SLTrain its support and its values."""
    generator = np.random.default_rng(2025)
    for name in sorted(layers):
        layer = layers[name]
        rank: int = layer.weights.rank  # type: ignore[attr-defined]
        put(layer, "A", uniform(generator, (rank, layer.in_features)))
        put(layer, "B", torch.zeros(layer.out_features, rank))
        if method == "sltrain":
            count = layer.sparse_value.numel()  # type: ignore[union-attr, operator]
            chosen = np.sort(generator.permutation(layer.out_features * layer.in_features)[:count])
            put(layer, "sparse_index", torch.from_numpy(chosen))
            bound = 1 / math.sqrt(layer.in_features)
            put(layer, "sparse_value", torch.from_numpy(generator.uniform(-1, 1, count) * bound))


def uniform(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(generator.uniform(-1, 1, shape) / math.sqrt(shape[1]))


@torch.no_grad()
def put(layer: ReparamLinear, name: str, value: Tensor) -> None:
    tensor = getattr(layer, name)
    assert tensor.shape == value.shape, f"{name} is {tuple(tensor.shape)}, recorded {tuple(value.shape)}"
    tensor.copy_(value)
