"""One optimizer step of our GaLore beside galore-torch 1.0 on the LLaMA-60M and 350M matrices, in one process.

    .venv/bin/pip install --no-deps galore-torch==1.0 tensorly bitsandbytes
    .venv/bin/python -m benchmarks.step_time

galore-torch is the published implementation (exact SVD at every refresh). Ours is timed with the same exact SVD and
with the warm-started randomised basis. Every optimizer gets the same gradients; they take turns, the median counts.
Gradients are random: their values do not change the time of a step.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import logging as transformers_logging

from benchmarks.rows import interleaved_median_sec, write_rows
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.strategy import Strategy

SIZES = {"llama_60m": (512, 1376, 128), "llama_350m": (1024, 2736, 256)}  # hidden, intermediate, GaLore's rank
VOCABULARY = 32000
NEVER = 1_000_000  # updates between refreshes, where none is wanted
ADAM = {"_target_": "lowrank_train.optim.moments.Adam", "eps": 1e-6, "eps_inside": False, "weight_decay_first": False}


def parameters(hidden: int, intermediate: int, layers: int) -> dict[str, nn.Parameter]:
    """Parameters with the names and shapes of a LLaMA of `layers` layers."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (VOCABULARY, hidden),
        "head": (VOCABULARY, hidden),
        "norm": (hidden,),
    }
    for layer in range(layers):
        for name in "qkvo":
            shapes[f"layers.{layer}.attn.{name}"] = (hidden, hidden)
        shapes |= {f"layers.{layer}.mlp.{name}": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"layers.{layer}.mlp.down"] = (hidden, intermediate)
    return {name: nn.Parameter(torch.randn(shape) * 0.02) for name, shape in shapes.items()}


def is_projected(name: str) -> bool:
    return ".attn." in name or ".mlp." in name


class Named(nn.Module):
    """Parameters under their own names, as a model has them."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.params = params

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.params.items())


def ours(params: dict[str, nn.Parameter], rank: int, every: int, subspace: str) -> torch.optim.Optimizer:
    target = {"svd": "svd.Svd", "randomized": "randomized.Randomized"}[subspace]
    config = StrategyConfig(
        name="galore",
        select=["*.attn.*", "*.mlp.*"],
        subspace={"_target_": f"lowrank_train.optim.subspace.{target}", "rank": rank, "every": every},
        inner=ADAM,
        lift={"_target_": "lowrank_train.optim.lift.Backproject"},
        rest=ADAM,
    )
    return Strategy.from_config(config).optimizer(Named(params), lr=1e-4)


def published(params: dict[str, nn.Parameter], rank: int, every: int) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(
        [
            {"params": [p for name, p in params.items() if not is_projected(name)]},
            {"params": [p for name, p in params.items() if is_projected(name)], **group},
        ],
        lr=1e-4,
        no_deprecation_warning=True,
    )


def stepper(
    build: Callable[[dict[str, nn.Parameter], int], torch.optim.Optimizer],
    params: dict[str, nn.Parameter],
    gradients: list[Tensor],
    every: int,
) -> Callable[[], None]:
    """A function that makes one step from the same gradients each time."""
    own = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    optimizer = build(own, every)

    def step() -> None:
        for param, gradient in zip(own.values(), gradients, strict=True):
            param.grad = gradient
        optimizer.step()

    return step


def measure(model: str, layers: int, repeats: int, refresh_repeats: int) -> list[dict[str, Any]]:
    hidden, intermediate, rank = SIZES[model]
    params = parameters(hidden, intermediate, layers)
    gradients = [torch.randn_like(param) for param in params.values()]
    builders: dict[str, Callable[[dict[str, nn.Parameter], int], torch.optim.Optimizer]] = {
        "galore-torch 1.0": lambda p, every: published(p, rank, every),
        "ours, exact SVD": lambda p, every: ours(p, rank, every, "svd"),
        "ours, randomized": lambda p, every: ours(p, rank, every, "randomized"),
    }
    plain = {name: stepper(build, params, gradients, NEVER) for name, build in builders.items()}
    plain_sec = interleaved_median_sec(plain, repeats)
    del plain
    refreshing = {name: stepper(build, params, gradients, 1) for name, build in builders.items()}
    refresh_sec = interleaved_median_sec(refreshing, refresh_repeats)
    first = next(iter(builders))
    return [
        {
            "model": model,
            "layers": layers,
            "rank": rank,
            "optimizer": name,
            "step_ms": round(1e3 * plain_sec[name], 1),
            "step_ratio": round(plain_sec[name] / plain_sec[first], 3),
            "refresh_step_ms": round(1e3 * refresh_sec[name], 1),
            "refresh_step_ratio": round(refresh_sec[name] / refresh_sec[first], 3),
        }
        for name in builders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers-60m", type=int, default=8, help="of 8")
    parser.add_argument("--layers-350m", type=int, default=4, help="of 24; the time is linear in them")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--refresh-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    rows = []
    for model, layers in (("llama_60m", arguments.layers_60m), ("llama_350m", arguments.layers_350m)):
        rows += measure(model, layers, arguments.repeats, arguments.refresh_repeats)
    table = Table(title="one optimizer step (ratio: to galore-torch 1.0)")
    for column in ("model", "layers", "rank", "optimizer", "step ms", "ratio", "step with refresh ms", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "optimizer") else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=130).print(table)
    print("written to", write_rows("step_time", rows))


if __name__ == "__main__":
    main()
