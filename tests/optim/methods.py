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

EIGHT_BIT = {"_target_": "lowrank_train.optim.stored.Storage", "min_elements": 16, "block": 32}
FOUR_BIT = {"storage": "int4", "storage_group": 32}
MOMENTS_IN_FOUR = EIGHT_BIT | {"first": "q4", "second": "q4", "block_q4": 16}
MIXED = EIGHT_BIT | {"first": "q4", "second": "q8_linear", "basis": "q8", "block_q4": 32}
LAZY = {"_target_": "lowrank_train.optim.subspace.lazy.Lazy", "threshold": 0.1, "window": 2}


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


def rule(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"lowrank_train.optim.{target}"} | arguments


def on_matrices(part: dict[str, Any]) -> Callable[[], StrategyConfig]:
    """The rule on whole matrices, Adam on the rest."""
    return lambda: StrategyConfig(name="whole", select=["*.weight"], inner=dict(part), rest=ADAM)


def on_all(part: dict[str, Any]) -> Callable[[], StrategyConfig]:
    return lambda: StrategyConfig(name="whole", rest=dict(part))


LAYERS = [["0.weight"], ["2.weight"], ["4.weight"]]


def lines(name: str, **arguments: Any) -> dict[str, Any]:
    number = {"density": 0.3} if arguments.get("of") == "entries" else {"density": 0.5}
    return rule(f"subspace.coordinates.{name}", every=4, **{**number, **arguments})


CROSS_HEAD = rule("subspace.cross_head.CrossHead", rank=3, every=4, head_dim=4, row_heads=["0.*"], column_heads=["2.*"])
SPARSE = rule("sparse_residual.SparseResidual", share=0.1, warmup=4)
GEODESIC = rule("subspace.geodesic.Geodesic", rank=3, every=4)
UNCORRECTED = ADAM | {"rotation": "uncorrected"}
SVD_THEN_RANDOM = rule("subspace.random.SvdThenRandom", rank=3, every=4, random_from=5)


def in_blocks(freeze_rest: bool = False, **changes: Any) -> Callable[[], StrategyConfig]:
    """Blocks of the matrices, one of them active at a time unless said otherwise."""

    def config() -> StrategyConfig:
        axes = {name: changes[name] for name in ("subspace", "lift") if name in changes}
        keys = {name: value for name, value in changes.items() if name not in axes}
        number = {} if "density" in keys else {"count": 1}
        schedule = {"_target_": "lowrank_train.optim.blocks.BlockSchedule", "by": "tensors", "every": 4} | number | keys
        return StrategyConfig(
            name="blocks", select=["*.weight"], inner=ADAM, rest=ADAM, blocks=schedule, freeze_rest=freeze_rest, **axes
        )

    return config


METHODS = [
    Method("full", lambda: StrategyConfig(name="full", rest={"_target_": ADAM["_target_"]}), projects=False),
    Method("galore", in_subspace()),
    Method("galore-reset", in_subspace(on_refresh="reset")),
    Method("galore-reverse", in_subspace(subspace=subspace("svd", side="reverse_std"))),
    Method("galore-both-sides", in_subspace(subspace=subspace("svd", side="full"))),
    Method("galore-randomized", in_subspace(subspace=subspace("randomized"))),
    Method("galore-staggered", in_subspace(subspace=subspace("randomized", stagger=True))),
    Method("full-8bit", lambda: StrategyConfig(name="full", rest=ADAM, storage=EIGHT_BIT), projects=False),
    Method("galore-8bit", in_subspace(storage=EIGHT_BIT)),
    Method("galore-8bit-reset", in_subspace(storage=EIGHT_BIT, on_refresh="reset")),
    Method("galore-8bit-rotate", in_subspace(storage=EIGHT_BIT, on_refresh="rotate")),
    Method("full-4bit", lambda: StrategyConfig(name="full", rest=ADAM, storage=MOMENTS_IN_FOUR), projects=False),
    Method("galore-4bit", in_subspace(storage=MOMENTS_IN_FOUR)),
    Method("galore-mixed-bits-rotate", in_subspace(storage=MIXED, on_refresh="rotate")),
    Method("q-galore", in_subspace(subspace=subspace("svd", every=2, **FOUR_BIT), refresh=LAZY, storage=EIGHT_BIT)),
    Method("q-galore-both-sides", in_subspace(subspace=subspace("svd", side="full", **FOUR_BIT))),
    Method("q-galore-randomized", in_subspace(subspace=subspace("randomized", storage="int8"), refresh=LAZY)),
    Method("frugal-block", in_blocks(density=0.5, inactive="sign", order="mirror"), projects=False),
    Method("badam", in_blocks(freeze_rest=True, patterns=LAYERS), projects=False),
    Method("lisa", in_blocks(patterns=LAYERS, count=2, order="uniform", on_switch="keep"), projects=False),
    Method("galore-in-blocks", in_blocks(subspace=subspace("svd"), lift=BACKPROJECT, count=2, order="ascending")),
    Method("muon", on_matrices(rule("muon.Muon", precision="wide")), projects=False),
    Method("auon", on_matrices(rule("muon.Auon", form="paper")), projects=False),
    Method("lion", on_all(rule("moments.Lion")), projects=False),
    Method("sgd", on_all(rule("moments.Momentum", nesterov=True)), projects=False),
    Method("adafactor", on_all(rule("adafactor.Adafactor", beta1=0.9)), projects=False),
    Method("library", on_all(rule("library.Library", name="NAdam")), projects=False),
    Method("library-no-lr", on_all(rule("library.Library", name="Rprop")), projects=False),
    Method("galore-muon", in_subspace(inner=rule("muon.Muon", precision="wide"))),
    Method("galore-muon-rotate", in_subspace(inner=rule("muon.Muon", precision="wide"), on_refresh="rotate")),
    Method("galore-lion", in_subspace(inner=rule("moments.Lion"))),
    Method("galore-momentum", in_subspace(inner=rule("moments.Momentum"), on_refresh="rotate")),
    Method("galore-adafactor", in_subspace(inner=rule("adafactor.Adafactor"))),
    Method("galore-library", in_subspace(inner=rule("library.Library", name="RAdam", betas=[0.8, 0.99]))),
    Method("galore-library-reset", in_subspace(inner=rule("library.Library", name="Adagrad"), on_refresh="reset")),
    Method("galore-library-8bit", in_subspace(inner=rule("library.Library", name="Adamax"), storage=EIGHT_BIT)),
    Method("cross-head", in_subspace(subspace=CROSS_HEAD)),
    Method("galore-plus", in_subspace(subspace=CROSS_HEAD, lift=SPARSE), projects=False),
    Method("grass", in_subspace(subspace=lines("Coordinates", of="rows", choose="top"), on_refresh="reset")),
    Method("grass-sampled", in_subspace(subspace=lines("SampledLines"), on_refresh="reset")),
    Method(
        "entries-rotate", in_subspace(subspace=lines("Coordinates", of="entries", choose="top"), on_refresh="rotate")
    ),
    Method("geodesic", in_subspace(subspace=GEODESIC, inner=UNCORRECTED, on_refresh="rotate")),
    Method(
        "subtrack",
        in_subspace(subspace=GEODESIC, inner=UNCORRECTED, on_refresh="rotate", lift=rule("lift.ScaledResidual")),
        projects=False,
    ),
    Method(
        "trion",
        in_subspace(
            subspace=rule("subspace.dct.Dct", rank=3),
            inner=rule("orthogonalize.Orthogonalized", precision="wide", adjust_lr="match_rms_adamw"),
            lift=rule("lift.Backproject", scale=1.0),
            feedback=rule("feedback.ErrorFeedback", retained=0.95),
        ),
        projects=False,
    ),
    Method("golore", in_subspace(subspace=SVD_THEN_RANDOM, on_refresh="rotate")),
    Method(
        "gradnormlorp",
        in_subspace(lift=rule("weight_norm.WeightNorm"), rest=rule("weight_norm.WeightNormAdam")),
        projects=False,
    ),
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
