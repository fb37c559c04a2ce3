"""What people read: the card, the banner's table, numbers with units, a console that behaves in a pipe."""

from __future__ import annotations

import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from lowrank_train.report.banner import BatchArithmetic, assignment_lines
from lowrank_train.report.card import card_rows, show_card
from lowrank_train.report.console import Console, WarningsToConsole
from lowrank_train.report.result import project_commit, write_result
from lowrank_train.report.units import format_bytes, format_count, format_duration

RESULT: dict[str, Any] = {
    "val_loss": 4.5, "val_perplexity": 90.02, "val_tokens": 123456, "unigram_perplexity": 450.1,
    "papers_val_perplexity": 88.8, "steps": 2000, "tokens": 1_024_000, "seconds": 95.4, "tokens_per_sec": 11000.0,
    "positions_per_sec": 11000.0, "peak_memory_bytes": 700 << 20, "weights_bytes": 4 << 20,
    "state_bytes": {"exp_avg": 1 << 20, "basis": 1 << 19}, "refreshes": 140, "refresh_sec": 1.5, "skipped_tensors": 0,
    "model": "llama_1m", "strategy": "galore", "data": "shakespeare", "sample": "My lord,\nI come.",
    "run_folder": "runs/x", "loss_curve": "runs/x/loss.png",
    "hardware": {"device": "a processor", "kind": "cpu", "devices": 1},
}  # fmt: skip


@dataclass
class Row:
    name: str
    shape: tuple[int, ...]
    role: str = "projected"
    side: str = "left"
    rank: int | None = 32
    state_bytes: int = 1024


def test_the_card_says_what_a_run_achieved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_card(Console(tmp_path / "log.txt"), RESULT)
    out = capsys.readouterr().out
    for part in ("90.02", "450.10", "80% lower", "88.80", "2,000 steps", "11,000 tokens/s", "700.0 MiB", "1.5 MiB",
                 "exp_avg 1.0 MiB, basis 512.0 KiB", "My lord,", "runs/x/loss.png", "1.5 s of it for 140"):  # fmt: skip
        assert part in out
    assert "not finite" not in out and "with padding" not in out
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == out


def test_the_card_mentions_padding_and_left_out_tensors_only_where_there_are_some() -> None:
    rows = dict(card_rows({**RESULT, "positions_per_sec": 20000.0, "skipped_tensors": 3, "refreshes": 0}))
    assert "20,000 positions/s with padding" in rows["speed"] and "refresh" not in rows["speed"]
    assert "3 updates" in rows["left out"]


def test_the_card_on_a_terminal_is_framed(tmp_path: Path) -> None:
    console = Console(tmp_path / "log.txt")
    drawn = io.StringIO()
    console.rich = RichConsole(file=drawn, force_terminal=True, width=100)
    show_card(console, RESULT)
    assert "╭" in drawn.getvalue() and "90.02" in drawn.getvalue()
    assert "╭" not in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_console_in_a_pipe_writes_plain_lines_and_warnings_to_the_error_stream(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    console = Console(tmp_path / "log.txt")
    console.say("[bold]one[/bold]")
    logger = logging.getLogger("lowrank_train.test")
    handler = WarningsToConsole(console)
    logger.addHandler(handler)
    logger.warning("the %s is full", "disk")
    logger.removeHandler(handler)
    out, err = capsys.readouterr()
    assert out == "[bold]one[/bold]\n"
    assert "warning: the disk is full\n" in err
    assert (tmp_path / "log.txt").read_text() == "[bold]one[/bold]\nwarning: the disk is full\n"


def test_other_ranks_are_silent_and_a_log_that_cannot_be_written_costs_one_warning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    silent = Console(tmp_path / "log.txt", silent=True)
    silent.say("one")
    silent.warn("two")
    assert not (tmp_path / "log.txt").exists()
    console = Console(tmp_path / "no" / "folder" / "log.txt")
    console.say("three")
    console.say("four")
    out, err = capsys.readouterr()
    assert out == "three\nfour\n"
    assert err == "warning: log.txt cannot be written any more\n"
    assert sys.stdout is not None


def test_the_assignment_has_one_line_for_all_layers() -> None:
    rows = [Row(f"model.layers.{layer}.mlp.up_proj.weight", (352, 128)) for layer in range(12)]
    rows.append(Row("lm_head.weight", (2048, 128), "rest", "", None, 4096))
    lines = assignment_lines(rows)
    assert len(lines) == 3
    assert "model.layers.*.mlp.up_proj.weight" in lines[1] and " 12 " in lines[1] and "12.0 KiB" in lines[1]
    assert "lm_head.weight" in lines[2] and "rest" in lines[2]


def test_batch_arithmetic_is_spelled_out() -> None:
    batch = BatchArithmetic(batch_size=16, micro_batches=4, devices=8, seq_len=256)
    assert batch.sentence().endswith("= 512 rows an update, x 256 tokens = 131,072 tokens")


def test_numbers_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 24 << 30, 3 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "24.0 GiB", "3.00 TiB"
    ]  # fmt: skip
    assert [format_count(n) for n in (7, 60_100_000, 6.74e9)] == ["7", "60.1M", "6.74B"]
    assert [format_duration(s) for s in (0, 59.6, 3725, 90061)] == ["0:00:00", "0:01:00", "1:02:05", "1 d 1:01:01"]


def test_a_result_is_written_whole(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", RESULT)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert "My lord" in (tmp_path / "result.json").read_text(encoding="utf-8")


def test_the_commit_is_the_checkouts(project_root: Path) -> None:
    commit, changed = project_commit()
    if not (project_root / ".git").exists():
        assert (commit, changed) == (None, None)
    else:
        assert commit is None or (len(commit) == 40 and isinstance(changed, bool))
