"""Killed at any moment and started again, a run is the run it would have been."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_train.checkpoint import checkpoint_folders, load_state, newest_complete
from tests.train.conftest import assert_same_run, rows_of
from tests.train.processes import Started

Run = Callable[..., Path]
Start = Callable[..., Started]


@pytest.fixture
def start(tiny: Callable[..., list[str]]) -> Start:
    """Train in a process of its own."""
    return lambda name, *more: Started(tiny(name, *more))


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy=galore", "trainer.total_batch_size=8"],
        ["strategy=full", "~strategy.subspace"],
    ],
    ids=["galore, two micro-batches", "full"],
)
def test_kill_minus_nine_and_the_same_command_again(run: Run, start: Start, settings: list[str]) -> None:
    whole = run("whole", *settings)
    killed = start("killed", *settings)
    victim_step = random.Random(str(settings)).randint(1, 11)
    killed.wait_for(f"step: {victim_step:>2}/12")
    killed.signal(signal.SIGKILL)
    assert killed.rest()[0] == -signal.SIGKILL
    assert len(rows_of(whole)) == 12
    before = checkpoint_folders(whole.with_name("killed") / "checkpoints")
    assert len(before) >= (victim_step - 1) // 3 - 1
    assert_same_run(whole, run("killed", *settings))


def test_killed_at_random_moments_until_it_is_done(run: Run, start: Start) -> None:
    whole = run("whole")
    moments = random.Random(5)
    for _ in range(2):
        process = start("killed", "trainer.save_every_steps=1")
        process.wait_for("run folder")
        time.sleep(moments.uniform(0.0, 0.5))
        process.signal(signal.SIGKILL)
        process.rest()
    assert_same_run(whole, run("killed", "trainer.save_every_steps=1"))


def test_ctrl_c_lets_the_update_finish_and_saves(run: Run, start: Start) -> None:
    asked = start("asked", "trainer.save_every_steps=0")
    asked.wait_for("step:  2/12")
    asked.signal(signal.SIGINT)
    code, rest = asked.rest()
    assert code == 130
    assert "stopped by SIGINT after step" in rest and "same command again" in rest
    assert_same_run(run("whole"), run("asked", "trainer.save_every_steps=0"))


def test_sigterm_during_an_evaluation_does_not_wait_for_it(run: Run, start: Start, corpus: Path) -> None:
    many = f"data.validation=[{','.join([f'{corpus}/train.jsonl'] * 3)}]"  # seconds of evaluation
    settings = ["trainer.steps=3", "optim.warmup_steps=1", "trainer.eval_every_steps=2", "trainer.batch_size=2", many]
    asked = start("asked", *settings)
    asked.wait_for("step: 2/3")
    time.sleep(0.1)
    asked.signal(signal.SIGTERM)
    code, rest = asked.rest()
    assert code == 143 and "val_loss" not in rest
    whole = run("whole", *settings)
    folder = whole.with_name("asked")
    checkpoint, _ = newest_complete(folder / "checkpoints")
    assert checkpoint is not None
    assert load_state(checkpoint)["lowrank_train"]["counters"]["pending_row"]["step"] == 2
    assert [row["step"] for row in rows_of(folder)] == ["1"]
    assert_same_run(whole, run("asked", *settings))
    assert rows_of(folder)[1]["val/loss"] != ""


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    process = start("twice", "trainer.total_batch_size=40000", "trainer.steps=12")
    process.wait_for("run folder")
    time.sleep(1.5)  # into the first update, which takes minutes
    try:
        for sent in range(30):  # several that come while torch computes are one to Python, on a busy machine
            process.signal(signal.SIGINT)
            if process.ended(0.3 if sent == 0 else 1.0):
                break
        assert process.ended(10)
    finally:
        if not process.ended(0):
            process.signal(signal.SIGKILL)
    assert process.rest()[0] in (-signal.SIGINT, 130)


def test_the_old_run_is_kept_when_starting_over(run: Run) -> None:
    first = run("r")
    assert_same_run(first, run("r", "resume=false").with_name("r.1"))


def test_a_complete_run_shows_its_card_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("r")
    curve = rows_of(folder)
    written = (folder / "result.json").read_bytes()
    capsys.readouterr()
    assert run("r") == folder
    out = capsys.readouterr().out
    assert "validation perplexity" in out and "This run is complete" in out and "step:" not in out
    assert rows_of(folder) == curve and (folder / "result.json").read_bytes() == written


def test_other_numbers_are_refused_with_the_keys(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("r")
    run("r", "optim.lr=0.5", code=2)
    assert "optim.lr is 0.5, but the run in" in capsys.readouterr().err


def test_going_on_with_more_updates_under_a_new_name(run: Run) -> None:
    first = run("r")
    longer = run("longer", f"resume={first}", "trainer.steps=14", "optim.lr=0.002")
    rows = rows_of(longer)
    assert rows[:12] == rows_of(first)
    assert [row["step"] for row in rows[12:]] == ["13", "14"]
    assert float(rows[13]["train/lr"]) < 0.002  # the new rate, under the new schedule


def test_a_constant_rate_goes_on_in_place(run: Run) -> None:
    settings = ["optim.schedule=constant"]
    whole = run("whole", *settings, "trainer.steps=8")
    run("r", *settings, "trainer.steps=6")
    longer = run("r", *settings, "trainer.steps=8")
    for part, other in zip(rows_of(whole), rows_of(longer), strict=True):
        assert part["train/loss"] == other["train/loss"]


def test_killed_between_the_last_checkpoint_and_the_result(run: Run) -> None:
    folder = run("r")
    result = (folder / "result.json").read_text(encoding="utf-8")
    (folder / "result.json").unlink()
    run("r")
    again = (folder / "result.json").read_text(encoding="utf-8")
    for key in ("val_loss", "val_perplexity", "papers_val_loss", "tokens", '"steps"'):
        line = next(line for line in result.splitlines() if key in line)
        assert line in again.splitlines()


def test_an_update_may_be_cut_into_other_micro_batches(run: Run) -> None:
    """Two of them, one, four. 1e-5: float32 sums in another order."""
    settings = ["data.packing=pad", "trainer.total_batch_size=16", "optim.schedule=constant"]
    whole = run("whole", *settings, "trainer.batch_size=8")
    run("cut", *settings, "trainer.batch_size=8", "trainer.steps=4")
    run("cut", *settings, "trainer.batch_size=16", "trainer.steps=7")
    cut = run("cut", *settings, "trainer.batch_size=4")
    for ours, theirs in zip(rows_of(cut), rows_of(whole), strict=True):
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
        assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-5)
