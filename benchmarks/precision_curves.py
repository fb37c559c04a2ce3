"""Evaluation loss of the default recipe with state and weights in fewer bits, beside that of the same run in float32.

    OMP_WAIT_POLICY=passive .venv/bin/python -m benchmarks.precision_curves

Every run is an ordinary run of the program: the default recipe's model, tokens, batch and seed, `--steps` updates,
one thread, the learning rate of its strategy. `difference` is the last evaluation loss less that of the same strategy
in float32, in nats; 8-bit state may cost 0.02 of them, 4-bit state and int8 weights 0.05. Runs that are complete in
`--folder` are not repeated, and rows that are not asked for stay in the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import earlier_rows, write_rows
from lowrank_train.cli import main as lowrank

STRATEGIES = {"galore": ("optim.lr=1e-2",), "full": ("optim.lr=1e-3",)}
REFERENCE = "fp32"
FORMATS: dict[str, tuple[str, ...]] = {
    REFERENCE: (),
    "bf16 state": ("strategy/storage=bf16",),
    "q8 state": ("strategy/storage=q8",),
    "q8_linear state": ("strategy/storage=q8_linear",),
    "q4 state": ("strategy/storage=q4",),
    "int8 weights": ("precision=int8",),
    "bf16_sr": ("precision=bf16_sr",),
    "bf16_kahan": ("precision=bf16_kahan",),
}
LIMITS = {"bf16 state": 0.02, "q8 state": 0.02, "q8_linear state": 0.02, "q4 state": 0.05, "int8 weights": 0.05}
"""Nats that a format may cost; bfloat16 weights are only told."""


def words(strategy: str, chosen: str, name: str, steps: int, folder: Path) -> list[str]:
    """The command line of one run."""
    return [
        f"strategy={strategy}", f"output_dir={folder}", f"run_name={name}", f"trainer.steps={steps}",
        "trainer.eval_every_steps=0", "trainer.save_every_steps=0", f"trainer.log_every_steps={steps}",
        "trainer.threads=1", "trainer.accelerator=cpu", *STRATEGIES[strategy], *FORMATS[chosen],
    ]  # fmt: skip


def result_of(strategy: str, chosen: str, steps: int, folder: Path) -> dict[str, Any]:
    """result.json of a run, made now or before. RuntimeError where it did not end well."""
    name = f"{strategy}-{chosen.replace(' ', '-')}-{steps}"
    path = folder / name / "result.json"
    if not path.is_file():
        code = lowrank(words(strategy, chosen, name, steps, folder))
        if code != 0:
            raise RuntimeError(f"{name} ended with exit code {code}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def measure(strategy: str, chosen: str, steps: int, folder: Path) -> dict[str, Any]:
    """One row; the run in float32 is made first where it is not there."""
    reference, result = (result_of(strategy, one, steps, folder) for one in (REFERENCE, chosen))
    difference, limit = result["val_loss"] - reference["val_loss"], LIMITS.get(chosen)
    return {
        "strategy": strategy,
        "format": chosen,
        "overrides": [*STRATEGIES[strategy], *FORMATS[chosen]],
        "steps": steps,
        "tokens": result["tokens"],
        "val_loss": round(result["val_loss"], 4),
        "difference": round(difference, 4),
        "limit": limit,
        "within": None if limit is None else abs(difference) <= limit,
        "weights_bytes": result["weights_bytes"],
        "state_bytes": sum(result["state_bytes"].values()),
    }


def place(row: dict[str, Any]) -> tuple[int, int]:
    """Where a row stands in the table."""
    return list(STRATEGIES).index(row["strategy"]), list(FORMATS).index(row["format"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="*", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("runs/precision_curves"))
    arguments = parser.parse_args()
    for strategy in arguments.strategies:
        for chosen in arguments.formats:
            row = measure(strategy, chosen, arguments.steps, arguments.folder)
            print(row, flush=True)
            others = [one for one in earlier_rows("precision_curves") if place(one) != place(row)]
            path = write_rows("precision_curves", sorted([*others, row], key=place))
    table = Table(title=f"{arguments.steps} updates; loss in nats a token")
    for column in ("strategy", "format", "loss", "difference", "limit", "weights, MiB", "state, MiB"):
        table.add_column(column, justify="left" if column in ("strategy", "format") else "right")
    for row in earlier_rows("precision_curves"):
        sizes = (f"{row[key] / 2**20:.2f}" for key in ("weights_bytes", "state_bytes"))
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        table.add_row(
            row["strategy"], row["format"], f"{row['val_loss']:.4f}", f"{row['difference']:+.4f}", limit, *sizes
        )
    Console(width=100).print(table)
    print("written to", path)


if __name__ == "__main__":
    main()
