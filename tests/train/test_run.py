"""A whole run in one process: its folder, its numbers, and how it ends when it cannot end well."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.checkpoint import checkpoint_folders, load_weights, newest_complete, read_manifest
from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.data import load_tokenizer, training_batches
from lowrank_train.evaluate.perplexity import evaluate
from lowrank_train.memory.counting import flops_per_position
from lowrank_train.models import build_model, causal_loss
from lowrank_train.optim.schedule import multiplier
from lowrank_train.train.csv_file import read_rows
from lowrank_train.train.recorder import metric_columns
from tests.test_checkpoint import small_disk  # noqa: F401  (a fixture)
from tests.train.conftest import assert_same_run, rows_of

Run = Callable[..., Path]
Words = Callable[..., list[str]]


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest_complete(folder / "checkpoints")
    assert checkpoint is not None
    return load_weights(checkpoint, read_manifest(checkpoint))


def furthest(first: Path, second: Path) -> float:
    """Largest difference of any weight, relative to the largest weight."""
    a, b = weights_of(first), weights_of(second)
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a)


def test_the_run_folder_holds_everything(run: Run, tiny: Words, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run("r", card=True)
    out, err = capfd.readouterr()
    assert err == ""
    assert "\r" not in out and "Tip" not in out
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} == {
        "config.yaml", "metrics.csv", "result.json", "loss.png", "card.html", "checkpoints", "log.txt"
    }  # fmt: skip
    assert [path.name for path in checkpoint_folders(folder / "checkpoints")] == ["step_00000009", "step_00000012"]
    assert (folder / "log.txt").read_text(encoding="utf-8") == out
    rows = read_rows(folder / "metrics.csv")
    assert list(rows[0]) == metric_columns(["projected", "rest"])
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert [row["step"] for row in rows if row["val/loss"]] == ["5", "10", "12"]
    moves = [int(row["optim/refreshes"]) for row in rows]
    assert moves[0] == 7, "every basis is found at the first update"
    assert (sum(moves[1:6]), sum(moves[6:11])) == (7, 7), "and moves once an interval from then on"
    assert 0 < min(moves[1:6]) <= max(moves[1:6]) < 7, "not all at the same update"
    result = result_of(folder)
    assert result.keys() >= {
        "val_loss", "val_perplexity", "unigram_perplexity", "papers_val_loss", "tokens_per_sec", "peak_memory_bytes",
        "seconds", "commit", "versions", "data_fingerprint", "tokenizer_fingerprint", "model", "hardware",
    }  # fmt: skip
    assert (result["steps"], result["seed"], result["strategy"]) == (12, 3, "galore")
    assert result["tokens"] == 12 * 4 * 32 == int(rows[-1]["tokens"])
    assert result["val_loss"] == float(rows[-1]["val/loss"])
    assert set(result["state_bytes"]) == {"exp_avg", "exp_avg_sq", "basis"}
    assert result["planned"]["complete"] and result["planned"]["peak_bytes"] > sum(result["state_bytes"].values())
    assert "validation perplexity" in out and str(folder / "loss.png") in out


def test_logged_rates_are_the_ones_used(run: Run, tiny: Words) -> None:
    config = compose(tiny("r"))
    rows = rows_of(run("r"))
    for step, row in enumerate(rows):
        factor = multiplier("cosine", step, warmup_steps=4, steps=12, min_lr_ratio=config.optim.min_lr_ratio)
        for column in ("train/lr", "train/lr_projected", "train/lr_rest"):
            assert float(row[column]) == pytest.approx(0.006 * factor, rel=1e-12)


def test_restarts_reach_the_optimizer(run: Run) -> None:
    """Two cycles of 6 updates, each later one from 0: the rates by the closed form of the schedule."""
    words = ["optim=cosine_restarts", "optim.cycle_steps=6", "optim.restart_warmup_steps=2", "optim.warmup_steps=2"]
    rates = [float(row["train/lr"]) for row in rows_of(run("r", *words, "optim.lr=1.0"))]
    lengths: dict[str, Any] = {"warmup_steps": 2, "steps": 12, "min_lr_ratio": 0.1}
    smooth = [multiplier("cosine", step, **lengths) for step in range(12)]
    assert rates == pytest.approx([*smooth[:6], 0.0, smooth[8] / 2, *smooth[8:]], rel=1e-12)


def test_the_first_loss_norm_and_evaluation_are_what_they_say(run: Run, tiny: Words) -> None:
    """Against a plain computation on the same rows: padding, two micro-batches, unequal numbers of targets."""
    words = tiny("r", "data.packing=pad", "trainer.total_batch_size=8", "optim.grad_clip=null", "trainer.steps=5")
    rows = rows_of(run("r", *words[3:]))
    config = compose(words)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(
        config.model, vocab_size=tokenizer.vocab_size, dtype=torch.float32, device="cpu", seed=config.seed
    )
    stream = training_batches(config.data, tokenizer, batch_size=4, micro_batches=2, seed=config.seed)
    window = [batch for batch, _ in zip(stream, range(2), strict=False)]
    losses = [causal_loss(model, batch, chunk_tokens=0) for batch in window]
    assert losses[0][1] != losses[1][1], "the micro-batches should have unequal numbers of targets"
    loss = sum(part for part, _ in losses) / sum(count for _, count in losses)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert float(rows[0]["train/loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert float(rows[0]["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert int(rows[0]["tokens"]) == sum(batch["num_tokens"] for batch in window) < 8 * 32
    found = evaluate(model, window, chunk_tokens=0, device=torch.device("cpu"))
    assert found.loss == pytest.approx(float(rows[0]["train/loss"]), rel=1e-6)


@pytest.mark.parametrize("packing", ["pad", "concat"])
def test_four_micro_batches_are_one_large_batch(run: Run, packing: str) -> None:
    settings = [f"data.packing={packing}", "trainer.total_batch_size=8", "trainer.steps=6"]
    one = run("one", *settings, "trainer.batch_size=8")
    four = run("four", *settings, "trainer.batch_size=2")
    if packing == "pad":  # the same documents in the same rows
        assert furthest(one, four) < 2e-4
        for a, b in zip(rows_of(one), rows_of(four), strict=True):
            assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-5)
            assert a["train/lr"] == b["train/lr"] and a["tokens"] == b["tokens"]
    assert len(rows_of(four)) == 6


def test_projecting_in_backward_changes_nothing(run: Run) -> None:
    after = run("after", "strategy.when=after_backward")
    during = run("during", "strategy.when=project_in_backward")
    assert furthest(after, during) == 0.0
    assert rows_of(after) == rows_of(during)


def test_bf16_runs_and_mixed_precision_too(run: Run) -> None:
    folder = run("bf16", "precision=bf16", "trainer.steps=4")
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.bfloat16}
    folder = run("mixed", "precision.compute=bf16-mixed", "trainer.steps=4")
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.float32}


def test_a_corpus_read_once_ends_the_run(run: Run, corpus: Path) -> None:
    settings = ["data.repeat=false", "data.log_documents=true", "trainer.batch_size=8", "data.packing=pad",
                "trainer.total_batch_size=16"]  # fmt: skip
    folder = run("r", *settings)
    result = result_of(folder)
    assert result["data_ended"] and result["steps"] == 3 == len(rows_of(folder))
    assert rows_of(folder)[-1]["val/loss"] != ""
    with (folder / "documents.csv").open(newline="", encoding="utf-8") as file:
        seen = list(csv.DictReader(file))
    count = sum(1 for _ in (corpus / "train.jsonl").open(encoding="utf-8"))
    assert len({row["document"] for row in seen}) == len(seen) == count
    assert run("r", *settings) == folder  # complete: nothing is trained again


def test_a_loss_that_is_not_finite_stops_before_the_update(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("r", "optim.lr=1e25", "optim.warmup_steps=0", "optim.grad_clip=null", "trainer.save_every_steps=1",
                 code=4)  # fmt: skip
    err = capsys.readouterr().err
    assert "the training loss became" in err and "Try a lower optim.lr" in err and "Traceback" not in err
    steps = [int(row["step"]) for row in rows_of(folder)]
    assert [int(path.name[5:]) for path in checkpoint_folders(folder / "checkpoints")] == steps[-2:]
    assert f"The last checkpoint is of step {steps[-1]}" in err
    assert all(math.isfinite(float(row["train/loss"])) for row in rows_of(folder))


def test_a_full_disk_costs_a_warning_then_the_run_but_no_checkpoint(
    tiny: Words,
    run: Run,
    small_disk: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = tiny("r", f"output_dir={small_disk}")
    (small_disk / "ballast").write_bytes(b"x" * 100_000)
    assert main(words) == 5
    err = capsys.readouterr().err
    assert "warning: step 6 could not be saved, the disk is full" in err and "training goes on" in err
    assert "step 12 could not be saved" in err and "Make room" in err and "the last checkpoint is of step 3" in err
    folder = small_disk / "r"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    assert main(words) == 0
    assert_same_run(run("whole"), folder)


def test_wandb_without_key_or_network_keeps_its_id(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    settings = ["logger=wandb", "optim.schedule=constant"]
    folder = run("r", *settings, "trainer.steps=5")
    assert "wandb is offline" in capsys.readouterr().err
    run("r", *settings, "trainer.steps=6")
    offline = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    own = (folder / "wandb_id.txt").read_text(encoding="utf-8")
    assert len(offline) == 2 and all(name.endswith(own) for name in offline)


def test_utilization_counts_as_the_palm_paper_does(tiny: Words) -> None:
    config = compose(tiny("r"))
    model = build_model(config.model, vocab_size=2048, dtype=torch.float32, device="meta", seed=0)
    per_layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    n = per_layer + 32 + 2048 * 32  # one layer, the last norm, the head; the input embedding is looked up
    assert flops_per_position(model, 256) == 6 * n + 12 * 1 * 32 * 256


def test_two_processes_are_one(tiny: Words, run: Run, project_root: Path, tmp_path: Path) -> None:
    """DDP over gloo: 2 ranks x 4 rows train as 1 rank x 8 rows, and one document is seen by one rank only."""
    settings = ["data.packing=pad", "trainer.total_batch_size=16", "data.log_documents=true", "trainer.steps=5"]
    one = run("one", *settings, "trainer.batch_size=8")
    words = tiny("two", *settings, "trainer.devices=2", "trainer.strategy=ddp")
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=project_root, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    assert done.stdout.count("step: 1/5") == 1
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a["tokens"] == b["tokens"]
        for column in ("train/loss", "train/grad_norm"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-4)
        if a["val/loss"]:
            assert float(a["val/loss"]) == pytest.approx(float(b["val/loss"]), rel=1e-4)
    assert result_of(one)["val_tokens"] == result_of(two)["val_tokens"]
    seen = [
        sorted((row["step"], row["document"]) for row in csv.DictReader((folder / "documents.csv").open(newline="")))
        for folder in (one, two)
    ]
    assert seen[0] == seen[1]
