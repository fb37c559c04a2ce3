"""Merges and other events in a real run: logged, drawn, and resumed bit for bit one step before, at and after each."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from lowrank_train.checkpoint import checkpoint_folder, load_weights, read_manifest
from lowrank_train.cli import main
from lowrank_train.report.plots import plot_loss
from tests.train.conftest import differences, rows_of, saved
from tests.train.processes import train_on_two

Run = Callable[..., Path]
RELORA = ["strategy=relora", "strategy.weights.rank=4", "strategy.merge.every=4"]
RESTARTS = ["optim=cosine_restarts", "optim.cycle_steps=4", "optim.restart_warmup_steps=1"]
CASES = {
    "relora, two micro-batches, dropout": [*RELORA, *RESTARTS, "trainer.total_batch_size=8"],
    "relora in bfloat16 after a warm start, in backward": [
        *RELORA, "strategy.weights.warm_start_steps=4", "precision=bf16", "strategy.weights.rounding=stochastic",
        "strategy.when=in_backward", "optim.grad_clip=null", "strategy.merge.moments=fresh",
    ],
    "fast forward, two micro-batches": [
        "strategy=fast_forward", "strategy.weights.rank=4", "strategy.repeat.every=4", "strategy.repeat.rows=3",
        "strategy.repeat.most=5", "trainer.total_batch_size=8", "optim.lr=1e-4",
    ],
    "lora with 8-bit Lion": [
        "strategy=lora", "strategy.weights.rank=4", "strategy/rest=lion", "strategy/storage=q8",
        "strategy.storage.min_elements=64",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumes_exactly_around_every_event(run: Run, case: str) -> None:
    whole = run("whole", *CASES[case], "trainer.save_every_steps=1", "trainer.keep_checkpoints=12")
    assert any(row["events"] for row in rows_of(whole)) == (case != "lora with 8-bit Lion")
    for step in (3, 4, 5, 8):
        start = checkpoint_folder(whole / "checkpoints", step)
        again = run(f"from_{step}", *CASES[case], f"resume={start}")
        assert differences(saved(whole)["weights"], saved(again)["weights"]) == []
        assert differences(saved(whole)["state"]["optimizer_states"], saved(again)["state"]["optimizer_states"]) == []
        assert rows_of(again)[step:] == rows_of(whole)[step:]


def test_the_log_and_the_curve_mark_each_event(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("r", *RELORA, *RESTARTS)
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        events = {int(row["step"]): row["events"] for row in csv.DictReader(file) if row["events"]}
    assert events == {4: "merge", 8: "merge", 12: "merge"}
    printed = capsys.readouterr()
    assert "step: 8  merge" in printed.out + printed.err + (folder / "log.txt").read_text(encoding="utf-8")


def test_the_picture_has_a_line_for_each_merge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run("r", *RELORA, *RESTARTS)
    drawn: list[Figure] = []
    real = Figure.savefig

    def save(figure: Figure, *arguments: object, **options: object) -> None:
        drawn.append(figure)
        real(figure, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", save)
    plot_loss(folder / "metrics.csv", tmp_path / "loss.png", title="r", unigram_perplexity=None)
    lines = [line for line in drawn[0].axes[0].lines if list(line.get_xdata()) in ([4, 4], [8, 8], [12, 12])]
    assert len(lines) == 3
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()].count("merge") == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_export_folds_everything(run: Run, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a round, so that the product is not zero."""
    settings = [*RELORA, *RESTARTS, f"precision={precision}", "trainer.steps=8", "strategy.merge.delay=2"]
    folder, hub = run("r", *settings), tmp_path / "hub"
    weights = checkpoint_weights(folder)
    assert weights["model.layers.0.mlp.up_proj.lora_B"].abs().max() > 0
    capsys.readouterr()
    assert main(["export", f"run={folder}", f"out={hub}"]) == 0
    assert "differ by at most" in capsys.readouterr().out
    from safetensors.torch import load_file

    plain = load_file(hub / "model.safetensors")
    assert not [name for name in plain if "lora" in name or "residue" in name]
    assert plain["model.layers.0.mlp.up_proj.weight"].ne(weights["model.layers.0.mlp.up_proj.weight"]).any()


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return load_weights(newest, read_manifest(newest))


def test_a_moment_that_cannot_be_thinned_is_refused_before_the_run(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("r", *RELORA, "strategy/rest=adafactor", code=2)
    assert "strategy.merge.moments=fresh" in capsys.readouterr().err


def test_a_merge_on_two_processes_is_a_merge_on_one(run: Run, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """DDP over gloo, across two merges: the same losses, and the same new draws. 1e-4 for the order of the sums."""
    settings = [*RELORA, *RESTARTS, "strategy.weights.dropout=0", "data.packing=pad", "trainer.total_batch_size=8"]
    one = run("one", *settings, "trainer.batch_size=8")
    train_on_two(tiny("two", *settings), tmp_path)
    for a, b in zip(rows_of(one), rows_of(tmp_path / "two"), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-4)
        assert a["events"] == b["events"]
    name = "model.layers.0.mlp.up_proj.lora_A"  # drawn anew at the last update
    assert torch.equal(checkpoint_weights(one)[name], checkpoint_weights(tmp_path / "two")[name])


def test_several_devices_refuse_what_changes_its_parameters(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Of which each holds some rows."""
    run("r", *RELORA, "strategy.weights.warm_start_steps=4", "trainer.devices=2", "trainer.strategy=fsdp", code=2)
    assert "end of warm start" in capsys.readouterr().err
