"""Run folders made of numbers chosen for the test, in the form that a run leaves them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_train.config import compose, save

COLUMNS = (
    "step", "tokens", "train/loss", "throughput/tokens_per_sec", "throughput/mfu", "memory/peak_bytes",
    "optim/refreshes", "events", "val/loss", "time/elapsed_sec",
)  # fmt: skip
MakeRun = Callable[..., Path]


def result_of(**changed: Any) -> dict[str, Any]:
    """The content of a result.json."""
    return {
        "val_loss": math.log(50.0), "val_perplexity": 50.0, "val_tokens": 9000, "unigram_perplexity": 430.0,
        "papers_val_loss": math.log(48.0), "papers_val_perplexity": 48.0, "tokens_per_sec": 1000.0,
        "positions_per_sec": 1000.0, "peak_memory_bytes": 600 << 20, "state_bytes": {"exp_avg": 3000, "basis": 1000},
        "weights_bytes": 8000, "parameters": 2000, "trainable_parameters": 1500, "steps": 40, "tokens": 4000,
        "positions": 4000, "seconds": 80.0, "sessions": 2, "data_ended": False, "refreshes": 6, "refresh_sec": 4.0,
        "skipped_tensors": 0, "model": "llama_1m", "strategy": "galore", "data": "shakespeare", "precision": "fp32",
        "seed": 42, "commit": "c0ffee" * 6 + "c0ff", "uncommitted_changes": True, "tokenizer_fingerprint": "70" * 32,
        "data_fingerprint": "da" * 32, "versions": {"python": "3.11", "torch": "2.13"},
        "hardware": {"device": "A <fast> CPU", "kind": "cpu", "devices": 1, "cpu_count": 2, "threads": 2,
                     "system": "Linux"},
        "sample": "To <b>be</b> & not", "run_folder": "runs/x", "loss_curve": "runs/x/loss.png",
        "planned": {"persistent_bytes": 9000, "peak_bytes": 40 << 20, "peak_phase": "update: forward",
                    "needed_bytes": 50 << 20, "complete": True},
        **changed,
    }  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run folder: words of its command line, and what differs in its result; `steps_done` below 40: unfinished.

    Its loss falls from 7 by 0.1 an update, with an evaluation every ten.
    """

    def make(name: str, *words: str, steps_done: int = 40, **result: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        short = (
            [] if any(word.startswith("recipe=") for word in words) else ["trainer.steps=40", "optim.warmup_steps=4"]
        )
        config = compose([f"run_name={name}", *short, *words])
        save(config, folder / "config.yaml")
        with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for step in range(1, steps_done + 1):
                writer.writerow({
                    "step": step, "tokens": 100 * step, "train/loss": 7 - 0.1 * step,
                    "throughput/tokens_per_sec": 500 + step, "throughput/mfu": "", "memory/peak_bytes": 5000 + step,
                    "optim/refreshes": int(step % 20 == 1), "events": "merge; reset" if step in (15, 30) else "",
                    "val/loss": 7.05 - 0.1 * step if step % 10 == 0 else "", "time/elapsed_sec": 2.0 * step,
                })  # fmt: skip
        if steps_done >= 40:
            names = {"model": config.model.name, "strategy": config.strategy.name, "data": config.data.name}
            found = result_of(**{**names, "run_folder": str(folder), "seed": config.seed, **result})
            (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")
        return folder

    return make
