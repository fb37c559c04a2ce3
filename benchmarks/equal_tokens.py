"""Every family of strategies on the same tokens, each at its own best learning rate: perplexity, sizes, speed.

    .venv/bin/python -m benchmarks.equal_tokens

The default model on the bundled plays. For each strategy learning rates are tried for `--tuning-steps` updates until
the best of them, by validation loss, has neighbours that are worse; the two best then train for `--steps`, and so
does the next of the grid while the best of those is at its end. Every run begins with the same seed, so that all see
the same rows in the same order. Ranks are equal, and so are the schedule (ReLoRA's has its restarts), the warm-up and
the clipping. Runs are ordinary runs of the program, and those already complete in `--folder` are not repeated, but
the short ones at the end that tokens/s come from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rows import write_rows
from lowrank_train.cli import main as lowrank
from lowrank_train.config.errors import EXIT_NOT_FINITE

RANK = 32
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
NEIGHBOURS = {lr: (GRID[index - 1], GRID[index + 1]) for index, lr in enumerate(GRID) if 0 < index < len(GRID) - 1}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)  # tried first
STRATEGIES: dict[str, tuple[str, ...]] = {
    "full": (),
    "galore": (f"strategy.subspace.rank={RANK}", "strategy.subspace.every=200"),
    "fira": (f"strategy.subspace.rank={RANK}", "strategy.subspace.every=200"),
    "lora": (f"strategy.weights.rank={RANK}", f"strategy.weights.alpha={RANK}"),
    "relora": (f"strategy.weights.rank={RANK}", f"strategy.weights.alpha={RANK}", "strategy.weights.dropout=0"),
    "sltrain": (f"strategy.weights.rank={RANK}", f"strategy.weights.alpha={RANK}"),
    "sst": (f"strategy.weights.rank={RANK}",),
    "lowrank": (f"strategy.weights.rank={RANK}",),
}


def words(name: str, strategy: str, lr: float, steps: int, folder: Path, threads: int) -> list[str]:
    """The command line of one run."""
    more = list(STRATEGIES[strategy])
    if strategy == "relora":  # four rounds; the published ones are of thousands of updates
        cycle = steps // 4
        more += [f"strategy.merge.every={cycle}", "optim=cosine_restarts", f"optim.cycle_steps={cycle}",
                 f"optim.restart_warmup_steps={max(5, cycle // 20)}"]  # fmt: skip
    return [
        f"strategy={strategy}", f"output_dir={folder}", f"run_name={name}", f"trainer.steps={steps}",
        "trainer.eval_every_steps=0", "trainer.save_every_steps=0", f"trainer.log_every_steps={steps}",
        f"trainer.threads={threads}", "trainer.accelerator=cpu",
        f"optim.lr={lr:g}", f"optim.warmup_steps={steps // 20}", *more,
    ]  # fmt: skip


def result_of(name: str, strategy: str, lr: float, steps: int, folder: Path, threads: int) -> dict[str, Any]:
    """result.json of a run, made now or before. RuntimeError where it did not end well, by its exit code."""
    path = folder / name / "result.json"
    if not path.is_file():
        code = lowrank(words(name, strategy, lr, steps, folder, threads))
        if code == EXIT_NOT_FINITE:  # no learning rate for this strategy
            return {"val_loss": float("inf")}
        if code != 0:
            raise RuntimeError(f"{name} ended with exit code {code}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def until_neighbours_are_worse(
    strategy: str, label: str, steps: int, first: Iterable[float], arguments: argparse.Namespace
) -> dict[float, dict[str, Any]]:
    """Learning rate -> result; while the best one is the lowest or highest tried, the grid is continued there."""
    results: dict[float, dict[str, Any]] = {}
    waiting = list(first)
    while waiting:
        for lr in waiting:
            name = f"{strategy}{label}-{lr:g}"
            results[lr] = result_of(name, strategy, lr, steps, arguments.folder, arguments.threads)
        best, ordered = min(results, key=lambda lr: float(results[lr]["val_loss"])), sorted(results)
        waiting = [NEIGHBOURS[best][0]] if best == ordered[0] else [NEIGHBOURS[best][1]] if best == ordered[-1] else []
    return results


def measure(strategy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tune, train, and one row of the table."""
    tuned = until_neighbours_are_worse(strategy, "-tune", arguments.tuning_steps, LEARNING_RATES, arguments)
    tried = {lr: float(result["val_loss"]) for lr, result in tuned.items()}
    two_best = sorted(tried, key=lambda lr: tried[lr])[:2]
    results = until_neighbours_are_worse(strategy, "", arguments.steps, two_best, arguments)
    best = min(results, key=lambda lr: float(results[lr]["val_loss"]))
    result = results[best]
    return {
        "strategy": strategy,
        "val_perplexity": round(result["val_perplexity"], 2),
        "val_loss": round(result["val_loss"], 4),
        "lr": best,
        "losses": {f"{lr:g}": round(found["val_loss"], 4) for lr, found in sorted(results.items())},
        "tuning_losses": {f"{lr:g}": round(tried[lr], 4) for lr in sorted(tried)},
        "trainable_parameters": result["trainable_parameters"],
        "parameters": result["parameters"],
        "weights_bytes": result["weights_bytes"],
        "state_bytes": sum(result["state_bytes"].values()),
        "tokens": result["tokens"],
        "unigram_perplexity": round(result["unigram_perplexity"], 2),
        "steps": arguments.steps,
        "tuning_steps": arguments.tuning_steps,
        "rank": RANK,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{rows[0]['tokens']:,} tokens each; unigram perplexity {rows[0]['unigram_perplexity']:.0f}")
    for column in ("strategy", "perplexity", "lr", "trained", "parameters", "state, MiB", "tokens/s"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in sorted(rows, key=lambda row: float(row["val_perplexity"])):
        table.add_row(
            row["strategy"], f"{row['val_perplexity']:.2f}", f"{row['lr']:g}", f"{row['trainable_parameters']:,}",
            f"{row['parameters']:,}", f"{row['state_bytes'] / 2**20:.2f}", f"{row['tokens_per_sec']:,}",
        )  # fmt: skip
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="*", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--tuning-steps", type=int, default=200)
    parser.add_argument("--speed-steps", type=int, default=100, help="updates of the runs that tokens/s are taken from")
    parser.add_argument("--folder", type=Path, default=Path("runs/equal_tokens"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    rows = [measure(strategy, arguments) for strategy in arguments.strategies]
    for row in rows:  # one after the other, so that a busy hour of the machine is the same for all
        strategy, lr = row["strategy"], row["lr"]
        name = f"{strategy}-speed-{time.time():.0f}"
        timed = result_of(name, strategy, lr, arguments.speed_steps, arguments.folder, arguments.threads)
        row["tokens_per_sec"] = round(timed["tokens_per_sec"])
    path = write_rows("equal_tokens", rows)
    print_table(rows)
    print("written to", path)


if __name__ == "__main__":
    main()
