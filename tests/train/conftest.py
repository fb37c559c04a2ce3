"""A run small enough to be done many times: a few pages of Shakespeare, 70 thousand parameters, one thread."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.checkpoint import load_state, load_weights, newest_complete, read_manifest
from lowrank_train.cli import main

WALL_CLOCK_COLUMNS = {
    "throughput/tokens_per_sec", "throughput/positions_per_sec", "throughput/mfu", "memory/now_bytes",
    "memory/peak_bytes", "time/refresh_sec", "time/elapsed_sec",
}  # fmt: skip
WALL_CLOCK_COUNTERS = {
    "refresh_sec", "measured_tokens", "measured_positions", "measured_sec", "elapsed_sec", "peak_memory_bytes",
    "sessions",
}  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Path:
    """train.jsonl and validation.jsonl: pieces of the bundled plays, of very unequal length."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 40), ("validation", 4)):
        with gzip.open(project_root / "data" / "shakespeare" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            text = "\n".join(json.loads(line)["text"] for line, _ in zip(file, range(60), strict=False))
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as out:
            start = 0
            for number in range(count):
                length = 20 + 37 * (number * number % 29)
                out.write(json.dumps({"text": text[start : start + length]}) + "\n")
                start += length
    return folder


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a command line that trains a tiny model for 12 updates into tmp_path/NAME."""

    def words(name: str, *more: str) -> list[str]:
        other = any(word.startswith("strategy=") and word != "strategy=galore" for word in more)
        galore = [] if other else ["strategy.subspace.rank=8", "strategy.subspace.every=5"]
        return [
            f"output_dir={tmp_path}", f"run_name={name}", "seed=3",
            "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1",
            "model.num_attention_heads=2", "data.seq_len=32",
            f"data.train=[{corpus}/train.jsonl]", f"data.validation=[{corpus}/validation.jsonl]",
            "optim.lr=0.006", "optim.warmup_steps=4", "optim.grad_clip=1.0", *galore,
            "trainer.steps=12", "trainer.batch_size=4", "trainer.eval_every_steps=5", "trainer.save_every_steps=3",
            "trainer.log_every_steps=1", "trainer.accelerator=cpu", "generate.max_new_tokens=8", *more,
        ]  # fmt: skip

    return words


@contextlib.contextmanager
def without_card() -> Iterator[None]:
    """Runs that end without a plan of their memory, picture and page: two thirds of the time of one so small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_train.train.summary.planned_memory", lambda config: None)
        patch.setattr("lowrank_train.train.run.draw", lambda folder: None)
        yield


@pytest.fixture
def run(tiny: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Train in this process; checks the exit code and gives the run folder."""

    def call(name: str, *more: str, code: int = 0, card: bool = False) -> Path:
        with contextlib.nullcontext() if card else without_card():
            assert main(tiny(name, *more)) == code
        return tmp_path / name

    return call


def rows_of(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that depend on the clock."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in WALL_CLOCK_COLUMNS} for row in csv.DictReader(file)]


def saved(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds but clocks."""
    checkpoint, passed_over = newest_complete(folder / "checkpoints")
    assert checkpoint is not None and not passed_over
    state = load_state(checkpoint)
    for name in WALL_CLOCK_COUNTERS:
        del state["lowrank_train"]["counters"][name]
    return {"step": checkpoint.name, "weights": load_weights(checkpoint, read_manifest(checkpoint)), "state": state}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two nested containers differ; tensors are compared bit for bit, with their dtypes."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [path]
    if isinstance(first, dict):
        if not isinstance(second, dict) or first.keys() != second.keys():
            return [f"{path}: keys {first.keys() ^ set(second)}"]
        return [place for key in first for place in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{path}: length"]
        pairs = enumerate(zip(first, second, strict=True))
        return [place for index, (a, b) in pairs for place in differences(a, b, f"{path}/{index}")]
    return [] if first == second else [f"{path}: {first} {second}"]


def assert_same_run(first: Path, second: Path) -> None:
    """Bit-identical weights, optimizer, schedule, generators, place in the data and curve."""
    assert differences(saved(first), saved(second)) == []
    assert rows_of(first) == rows_of(second)
