"""A LLaMA of 4 layers trained for 200 updates on WikiText-2 by every method, beside recorded runs of published code.

    .venv/bin/python -m benchmarks.end_to_end --reference ../shared/reference/e2e

The recordings hold tokens, initial weights (as a recipe), every loss and the evaluation loss at update 200. Each method
runs twice through `lowrank_train.optimizer`: with published=True, and with our defaults (signs aligned, bases found by
warm-started randomised iteration and moved in turn). APOLLO's published random matrices are drawn anew from their
seeds, in both, since the loss of APOLLO-Mini, which has rank 1, ranges from 5.36 to 5.92 over draws; FRUGAL's random
columns were drawn without a seed, so that ours are others. `--nudges 3` repeats the runs three times with every initial
weight a millionth of itself away: what lies between their ends, rounding alone decides.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import recorded_layers
from benchmarks.rows import earlier_rows, write_rows
from lowrank_train import optimizer
from lowrank_train.config.schema import ModelConfig
from lowrank_train.models import build_model, causal_loss
from lowrank_train.published import METHODS

PROJECT = ["*.self_attn.*.weight", "*.mlp.*.weight"]


@dataclass(frozen=True)
class Run:
    """A recorded run: the method that replays it, and what its record leaves to the defaults of a script."""

    recorded: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, folder: Path) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads((folder / f"{self.recorded}.json").read_text())
        return settings


RUNS = [
    Run("galore_adamw", "galore"),
    Run("fira", "fira"),
    Run("apollo", "apollo"),
    Run("apollo_mini", "apollo"),
    Run("frugal_svd", "frugal"),
    Run("frugal_columns", "frugal_coord"),
    Run("ldadam", "ldadam"),
    Run("osd", "online_subspace"),
    Run("galore_adamw8bit", "galore_8bit"),
    Run("frugal_columns_lr1e-2", "frugal_coord"),
    Run("adamw", "adamw"),
    Run("adamw_lr5e-3", "adamw"),
    Run("adamw_lr1e-2", "adamw"),
    Run("adamw_split", "adamw", {"ratio": 0.25}),
    Run("adamw_split_ratio0.1", "adamw", {"ratio": 0.1}),
    Run("adamw_split_ratio0.05", "adamw", {"ratio": 0.05}),
    Run("lora", "lora"),
    Run("relora", "relora"),
    Run("relora_asis", "relora"),
    Run("sltrain", "sltrain"),
    Run("sltrain_lr1e-2", "sltrain"),
    Run("sltrain_lr1e-3", "sltrain"),
    Run("lowrank", "lowrank"),
]


def initial_model(sizes: dict[str, Any]) -> nn.Module:
    """The recorded weights: numpy normals in the order of the parameters' names, scaled by 0.02; ones for vectors."""
    config = ModelConfig(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
    )
    model = build_model(config, vocab_size=sizes["vocab"], dtype=torch.float32, device="cpu", seed=0)
    generator = np.random.default_rng(2024)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            if param.ndim == 1:
                param.fill_(1.0)
            else:
                param.copy_(torch.from_numpy((0.02 * generator.standard_normal(tuple(param.shape))).astype(np.float32)))
            if name == "model.embed_tokens.weight":
                param[0] = 0.0
    return model


def blocks(folder: Path, name: str, length: int) -> Tensor:
    tokens = np.load(folder / name).astype(np.int64)
    return torch.from_numpy(tokens[: len(tokens) // length * length].reshape(-1, length))


def summed_loss(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return causal_loss(model, {"input_ids": rows, "labels": rows}, chunk_tokens=1024)


def apollo_draws(model: nn.Module, rank: int) -> Callable[[str, int, Tensor], Tensor]:
    """APOLLO's random matrices: a generator a tensor, whose first seed is its place among all, what is projected last.

    The order is that of the recorded model, which declares down_proj before up_proj. The next seed is the fifteenth
    number of a generator with the seed before.
    """
    names = [name for name, _ in model.named_parameters()]
    projected = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in PROJECT)]
    projected.sort(key=lambda name: (int(name.split(".")[2]), "mlp" in name, "up_proj" in name))  # stable
    ordered = [name for name in names if name not in projected] + projected
    seeds = {name: index for index, name in enumerate(ordered, start=1)}

    def draw(name: str, update: int, grad: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seeds[name])
        rows, columns = grad.shape
        drawn = torch.randn((rank, columns) if rows >= columns else (rows, rank), generator=generator)
        upcoming = torch.randint(0, 2**63 - 1, (15,), generator=torch.Generator().manual_seed(seeds[name]))
        seeds[name] = int(upcoming[-1])
        return drawn / math.sqrt(rank)

    return draw


def train(
    folder: Path, run: Run, *, published: bool, nudge: int = 0, updates: int | None = None
) -> tuple[list[float], float]:
    """Losses of the first `updates` of a run, or of all, and the evaluation loss after them.

    From other initial weights for each `nudge` but 0.
    """
    settings = run.settings(folder)
    model, length = initial_model(settings["model"]), settings["seq"]
    if nudge:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1 + 1e-6 * torch.randn(param.shape, generator=generator))
    ratio = 1.0
    if run.method in recorded_layers.METHODS:
        prepared = recorded_layers.prepare(model, run.method, settings, published=published)
    else:
        prepared, ratio = prepared_optimizer(model, run, settings, published=published)
    optim = prepared.optimizer
    train_blocks, losses = blocks(folder, "train_tokens.npy", length), []
    order = np.random.default_rng(0).permutation(len(train_blocks))
    for update in range(updates or settings["steps"]):
        chosen = order[(update * settings["batch"] + np.arange(settings["batch"])) % len(order)]
        loss, targets = summed_loss(model, train_blocks[chosen])
        (loss / targets).backward()
        for group in optim.param_groups:
            scale = prepared.factor(update) * (ratio if group["name"] == "projected" else 1.0)
            group["lr"] = settings["lr"] * scale
        optim.step()
        optim.zero_grad()
        prepared.after(update + 1)
        losses.append(loss.item() / targets)
    with torch.no_grad():
        sums = [summed_loss(model, rows) for rows in blocks(folder, "eval_tokens.npy", length)[:128].split(16)]
    return losses, sum(loss.item() for loss, _ in sums) / sum(targets for _, targets in sums)


def prepared_optimizer(
    model: nn.Module, run: Run, settings: dict[str, Any], *, published: bool
) -> tuple[recorded_layers.Prepared, float]:
    """The optimizer of a method with dense weights; and the matrices' learning rate as a multiple of the others'."""
    options = {key: value for key, value in (settings["method_args"] | run.options).items() if key != "note"}
    ratio = options.pop("ratio", 1.0)  # of the matrices' learning rate to the others'
    source = apollo_draws(model, options["rank"]) if run.method == "apollo" else None
    optim = optimizer(
        run.method, model, lr=settings["lr"], project=PROJECT, published=published, basis_source=source, **options
    )
    factor = recorded_layers.factor_of(settings["schedule"], published=False)
    return recorded_layers.Prepared(optim, lambda update: None, factor), ratio


def measure(folder: Path, run: Run, *, published: bool, nudges: int) -> dict[str, Any]:
    """One row: the recorded and our evaluation loss at the last update, and the largest early difference."""
    settings, started = run.settings(folder), time.perf_counter()
    losses, evaluation = train(folder, run, published=published)
    recorded = settings["eval_losses"][str(settings["steps"])]
    nudged = [train(folder, run, published=published, nudge=nudge)[1] for nudge in range(1, nudges + 1)]
    return {
        "run": run.recorded,
        "method": run.method,
        "conventions": "published" if published else "ours",
        "recorded_loss": round(recorded, 4),
        "our_loss": round(evaluation, 4),
        "difference": round(evaluation - recorded, 4),
        "nudged_losses": [round(loss, 4) for loss in nudged],
        "first_5_losses_differ_by": round(
            max(abs(a - b) for a, b in zip(losses[:5], settings["losses"], strict=False)), 6
        ),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="evaluation loss after 200 updates")
    for column in ("run", "recorded", "published", "difference", "our defaults", "difference "):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name in dict.fromkeys(row["run"] for row in rows):
        of = {row["conventions"]: row for row in rows if row["run"] == name}
        recorded = next(iter(of.values()))["recorded_loss"]
        cells = [
            text
            for kind in ("published", "ours")
            for text in ((f"{of[kind]['our_loss']:.4f}", f"{of[kind]['difference']:+.4f}") if kind in of else ("", ""))
        ]
        table.add_row(name, f"{recorded:.4f}", *cells)
    Console(width=110).print(table)
    for kind in ("published", "ours"):
        differences = [row["difference"] for row in rows if row["conventions"] == kind]
        if differences:
            print(f"{kind}: mean difference from the recorded loss {statistics.mean(differences):+.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder of the recorded end-to-end runs")
    parser.add_argument("--runs", nargs="*", help="names of recorded runs; default: all")
    parser.add_argument("--conventions", nargs="*", choices=["published", "ours"], default=["published", "ours"])
    parser.add_argument("--nudges", type=int, default=0, help="further runs from weights a millionth away")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kinds = {True: "published", False: "ours"}
    chosen = [
        run
        for run in RUNS
        if run.method in {*METHODS, *recorded_layers.METHODS} and (not arguments.runs or run.recorded in arguments.runs)
    ]
    rows = earlier_rows("end_to_end")
    for published in (True, False):
        for run in chosen:
            if kinds[published] not in arguments.conventions:
                continue
            if run.method == "adamw" and not published:
                continue  # nothing in it is a matter of convention
            row = measure(arguments.reference, run, published=published, nudges=arguments.nudges)
            print(row, flush=True)
            same = (row["run"], row["conventions"])
            rows = [other for other in rows if (other["run"], other["conventions"]) != same] + [row]
            path = write_rows("end_to_end", rows)
    print_table(rows)
    print("written to", path)


if __name__ == "__main__":
    main()
