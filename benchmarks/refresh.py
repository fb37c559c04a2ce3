"""Moving the basis: our randomised subspace against exact SVD, in time and in captured energy of real gradients.

    .venv/bin/python -m benchmarks.refresh

A LLaMA with the widths of the 350M model (two layers) is trained on the bundled corpus with the strategy itself; at
every refresh the gradient of each MLP matrix (1024 x 2736) is decomposed exactly as galore-torch 1.0 does it
(torch.linalg.svd of the float32 gradient) and followed by one warm-started iteration, both timed in turn. Energy is
the share of ||G||^2 that the basis keeps, relative to the share that the exact decomposition keeps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import write_rows
from lowrank_train.config import compose
from lowrank_train.data import load_tokenizer, training_batches
from lowrank_train.models import build_model, causal_loss
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import State, tensor_of
from lowrank_train.strategy import Strategy


def published_refresh(gradient: Tensor, rank: int) -> Tensor:
    """galore-torch's projector for a tall or square (right) or wide (left) matrix, as (dimension, rank)."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    return right[:rank].T if gradient.shape[0] >= gradient.shape[1] else left[:, :rank]


def energy(gradient: Tensor, basis: Tensor) -> float:
    projected = gradient @ basis if gradient.shape[1] == basis.shape[0] else basis.T @ gradient
    return (projected.square().sum() / gradient.square().sum()).item()


class Observer:
    """Times both refreshes whenever the strategy's own subspace moves the basis of an MLP matrix."""

    def __init__(self, subspace: Subspace, rank: int) -> None:
        self.rank = rank
        self.rows: list[dict[str, Any]] = []
        self.update = 0
        self.plain_refresh = subspace.refresh
        subspace.refresh = self.refresh  # type: ignore[method-assign]

    def refresh(self, gradient: Tensor, state: State) -> bool:
        started = time.perf_counter()
        moved = self.plain_refresh(gradient, state)
        ours_sec = time.perf_counter() - started
        if gradient.shape[0] != gradient.shape[1]:
            started = time.perf_counter()
            exact = published_refresh(gradient, self.rank)
            exact_sec = time.perf_counter() - started
            basis = tensor_of(state, "basis_right" if "basis_right" in state else "basis_left")
            exact_energy = energy(gradient, exact)
            self.rows.append(
                {
                    "update": self.update,
                    "start": "cold" if self.update == 0 else "warm",
                    "shape": list(gradient.shape),
                    "rank": self.rank,
                    "exact_energy": round(exact_energy, 4),
                    "relative_energy": round(energy(gradient, basis) / exact_energy, 4),
                    "exact_ms": round(1e3 * exact_sec, 1),
                    "ours_ms": round(1e3 * ours_sec, 1),
                    "speedup": round(exact_sec / ours_sec, 1),
                }
            )
        return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=41)
    parser.add_argument("--every", type=int, default=20, help="updates between refreshes")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = compose(
        [
            "model=llama_350m",
            "model.num_hidden_layers=2",
            "model.vocab_size=null",
            "data=shakespeare",
            "strategy=galore",
            "strategy/subspace=randomized",
            f"strategy.subspace.rank={arguments.rank}",
            f"strategy.subspace.every={arguments.every}",
        ]
    )
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(
        config.model, vocab_size=tokenizer.vocab_size, dtype=torch.float32, device="cpu", seed=config.seed
    )
    strategy = Strategy.from_config(config.strategy, seed=config.seed)
    optimizer = strategy.optimizer(model, lr=2e-3)
    assert isinstance(strategy.selected, InSubspace)
    observer = Observer(strategy.selected.subspace, arguments.rank)
    batches = iter(training_batches(config.data, tokenizer, batch_size=8, micro_batches=1, seed=config.seed))
    for update in range(arguments.updates):
        observer.update = update
        loss, targets = causal_loss(model, next(batches), chunk_tokens=1024)
        (loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"update {update}: loss {loss.item() / targets:.3f}", flush=True)
    table = Table(title=f"rank {arguments.rank}, {arguments.every} updates between refreshes")
    for column in observer.rows[0]:
        table.add_column(column, justify="right")
    for row in observer.rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=130).print(table)
    warm = [row for row in observer.rows if row["start"] == "warm"]
    print(
        f"warm refreshes: median {statistics.median(row['speedup'] for row in warm):.1f} times faster than exact SVD, "
        f"smallest relative energy {min(row['relative_energy'] for row in warm):.4f}"
    )
    print("written to", write_rows("refresh", observer.rows))


if __name__ == "__main__":
    main()
