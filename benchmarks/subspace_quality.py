"""How much of real gradients each subspace captures, against exact SVD, and what it costs.

    .venv/bin/python -m benchmarks.subspace_quality

A LLaMA with the widths of the 60M model (two layers) is trained on the bundled corpus with AdamW, and the gradients of
three of its matrices are kept. Then every subspace follows them, its basis moving as often as given. Energy is the
share of ||G||^2 inside the span of the basis, over the share that the exact decomposition of that very gradient keeps:
`moving` at the updates where the basis moves, `between` at all others. The time is that of one move.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import RESULTS, write_rows
from lowrank_train.config import compose
from lowrank_train.config.parts import instantiate
from lowrank_train.data import load_tokenizer, training_batches
from lowrank_train.models import build_model, causal_loss
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Rates, Slot, State, tensor_of
from lowrank_train.strategy import Strategy

MATRICES = ("layers.1.self_attn.q_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.down_proj")
WARM_UP_UPDATES = 20  # before gradients are kept: the first ones are those of random weights
CHOICES = {
    "svd": ["strategy/subspace=svd"],
    "randomized": ["strategy/subspace=randomized"],
    "power": ["strategy/subspace=power"],
    "online": ["strategy/subspace=online"],
    "dct": ["strategy/subspace=dct"],
    "rows, random": ["strategy/subspace=coordinates", "strategy.subspace.of=rows"],
    "rows, top norm": [
        "strategy/subspace=coordinates",
        "strategy.subspace.of=rows",
        "strategy.subspace.choose=top",
    ],
    "cross_head": ["strategy/subspace=cross_head"],
    "geodesic": ["strategy/subspace=geodesic"],
    "orthonormal": ["strategy/subspace=orthonormal"],
    "gaussian": ["strategy/subspace=gaussian"],
}
EVERY_UPDATE = {"power", "online"}  # what their papers do; the others move as often as given


def gradients_of_training(updates: int) -> list[dict[str, Tensor]]:
    """Gradients of the chosen matrices over consecutive updates of a real run."""
    words = ["model=llama_60m", "model.num_hidden_layers=2", "model.vocab_size=null", "data=shakespeare"]
    config = compose([*words, "strategy=full", "recipe=null"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(
        config.model, vocab_size=tokenizer.vocab_size, dtype=torch.float32, device="cpu", seed=config.seed
    )
    optimizer = Strategy.from_config(config.strategy, seed=config.seed).optimizer(model, lr=1e-3)
    batches = iter(training_batches(config.data, tokenizer, batch_size=8, micro_batches=1, seed=config.seed))
    kept = []
    for update in range(WARM_UP_UPDATES + updates):
        loss, targets = causal_loss(model, next(batches), chunk_tokens=1024)
        (loss / targets).backward()
        if update >= WARM_UP_UPDATES:
            named = model.named_parameters()
            kept.append({n: p.grad.clone() for n, p in named if any(m in n for m in MATRICES) and p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return kept


def build(name: str, rank: int, every: int) -> Subspace:
    words = [*CHOICES[name], f"strategy.subspace.rank={rank}"]
    config = compose(["recipe=null", "strategy=galore", *words])
    subspace = instantiate(config.strategy.subspace or {})
    assert isinstance(subspace, Subspace)
    subspace.stagger = False
    if name not in EVERY_UPDATE:
        subspace.every = every
    return subspace


def captured(gradient: Tensor, subspace: Subspace, state: State) -> float:
    """The share of the gradient's energy inside the span of the basis."""
    keys = [key for key in ("basis_left", "basis_right") if key in state]
    if keys:
        span = torch.linalg.qr(tensor_of(state, keys[0]).float()).Q
        low = gradient @ span if keys[0] == "basis_right" else span.T @ gradient
    else:
        low = subspace.down(gradient, state)
    return (low.square().sum() / gradient.square().sum()).item()


def follow(name: str, matrix: str, sequence: list[Tensor], rank: int, every: int) -> dict[str, list[float]]:
    """One subspace over the gradients of one matrix: energy and seconds."""
    subspace = build(name, rank, every)
    rule = InSubspace(subspace, Adam(), Backproject())
    param = torch.zeros_like(sequence[0])
    state = rule.init(param, Slot(matrix, 0, 0.0, torch.float32))
    found: dict[str, list[float]] = {"moving": [], "between": [], "sec": []}
    for update, gradient in enumerate(sequence):
        singular_values = torch.linalg.svdvals(gradient)
        best = (singular_values[:rank].square().sum() / singular_values.square().sum()).item()
        due = rule.refresh_due(state)
        started = time.perf_counter()
        low = rule.compress(gradient, state)
        elapsed_sec = time.perf_counter() - started
        moved = due and update > 0  # the first move has no basis to start from
        if due and update > 0:
            found["sec"].append(elapsed_sec)
        if update > 0:
            found["moving" if moved else "between"].append(captured(gradient, subspace, state) / best)
        rates = Rates(1e-3, 1e-3)
        rule.update(low, state, param, rates)
        rule.settle(state, rates)
    return found


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a subspace: the captured energy, and beside it the time of a move."""
    shown = sorted(rows, key=lambda row: row["energy_moving"])
    figure = Figure(figsize=(7.5, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([row["subspace"] for row in shown], [row["energy_moving"] for row in shown], color="tab:blue")
    axes.bar_label(
        bars, [f"{row['energy_moving']:.3f}   {row['move_ms']:.1f} ms" for row in shown], padding=4, fontsize=9
    )
    axes.set_xlim(0, 1.25)
    axes.set_xlabel("captured energy where the basis moves, exact SVD = 1; milliseconds a move")
    axes.set_title(f"rank {rows[0]['rank']}, gradients of training", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=16, help="whose gradients are kept")
    parser.add_argument("--every", type=int, default=5, help="updates between two moves")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kept = gradients_of_training(arguments.updates)
    rows: list[dict[str, Any]] = []
    for name in CHOICES:
        joined: dict[str, list[float]] = {"moving": [], "between": [], "sec": []}
        for matrix in kept[0]:
            sequence = [gradients[matrix] for gradients in kept]
            for key, values in follow(name, matrix, sequence, arguments.rank, arguments.every).items():
                joined[key] += values
        row: dict[str, Any] = {"subspace": name, "rank": arguments.rank}
        row["every"] = 1 if name in EVERY_UPDATE else arguments.every
        row["energy_moving"] = round(statistics.mean(joined["moving"]), 4)
        row["energy_between"] = round(statistics.mean(joined["between"]), 4) if joined["between"] else None
        row["move_ms"] = round(1e3 * statistics.median(joined["sec"]), 2)
        rows.append(row)
        print(row, flush=True)
    table = Table(title="captured energy of real gradients (exact SVD = 1)")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "subspace" else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=110).print(table)
    print("written to", write_rows("subspace_quality", rows))
    picture(rows, RESULTS / "subspace_quality.png")


if __name__ == "__main__":
    main()
