"""`lowrank compare`: the table, the CSV, what differs, what cannot be compared, and what cannot be read."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from lowrank_train.cli import main
from lowrank_train.report.compare import readable, rich_table
from lowrank_train.report.grouping import best_lines, grouped, memory_of, pareto_front, warnings
from lowrank_train.report.runs import BrokenRun, differing, read_metrics, read_run
from tests.report.conftest import MakeRun, result_of

PICTURES = {
    "loss_over_tokens.png", "loss_over_time.png", "perplexity_over_memory.png", "speed_over_memory.png", "compare.png",
}  # fmt: skip


def compared(out: Path, *words: str | Path) -> list[dict[str, str]]:
    """The rows of the CSV that a comparison writes."""
    assert main(["compare", *map(str, words), f"out={out}"]) == 0
    return list(csv.DictReader(io.StringIO((out / "compare.csv").read_text(encoding="utf-8"))))


def test_runs_side_by_side(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    galore = make_run("a=1,b", val_perplexity=61.5, tokens_per_sec=2000.0)
    full = make_run("full", "strategy=full", "optim.lr=0.003", "seed=7", val_perplexity=60.25, planned=None)
    begun = make_run("begun", "strategy=fira", steps_done=25)
    rows = compared(tmp_path / "out", galore, full, begun)
    assert [row["run"] for row in rows] == ["full", "a=1,b", "begun"], "best first, unfinished ones last"
    first = rows[0]
    assert (first["strategy"], first["val_perplexity"], first["lr"], first["seed"]) == ("full", "60.25", "0.003", "7")
    assert (first["state_bytes"], first["peak_memory_bytes"], first["tokens_per_sec"]) == (
        "4000",
        str(600 << 20),
        "1000.0",
    )
    assert (first["hours"], first["planned_peak_bytes"]) == (str(80 / 3600), "")
    assert first["strategy.name"] == "full" and "strategy.subspace.rank" not in first
    unfinished = rows[2]
    assert (unfinished["finished"], unfinished["steps"], unfinished["tokens"]) == ("false", "25", "2500")
    assert (unfinished["state_bytes"], unfinished["peak_memory_bytes"]) == ("", "5025")
    assert float(unfinished["val_perplexity"]) == pytest.approx(2.718281828 ** (7.05 - 2.0)), "of its last evaluation"
    assert float(unfinished["tokens_per_sec"]) == pytest.approx(513.5), "the median of updates 2 to 25"
    out = capsys.readouterr().out
    for part in ("60.25", "25 of 40", "begun (not finished)", "strategy.name: full (#1); galore (#2); fira (#3)",
                 "optim.lr: 0.003 (#1); 0.01 (#2, #3)", "libraries included"):  # fmt: skip
        assert part in out, part
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.txt", "compare.csv", *PICTURES}
    written = (tmp_path / "out" / "compare.txt").read_text(encoding="utf-8")
    assert all(line in out for line in written.splitlines())


def test_what_is_written_is_the_same_each_time(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", "strategy=full")]
    for name in ("one", "two"):
        compared(tmp_path / name, *runs)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_broken_folders_are_named_and_passed_over(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, torn, odd, unbegun = make_run("good"), make_run("torn"), make_run("odd"), make_run("unbegun")
    (torn / "result.json").write_text('{"val_loss":')
    (odd / "config.yaml").write_text("model: [")
    (unbegun / "metrics.csv").unlink()
    (unbegun / "result.json").unlink()
    (tmp_path / "empty").mkdir()
    names = [good, torn, odd, unbegun, tmp_path / "empty", tmp_path / "none"]
    assert len(compared(tmp_path / "out", *names)) == 1
    err = capsys.readouterr().err
    for part in ("torn: result.json cannot be read", "odd: config.yaml, line 1: not valid YAML", "unbegun: has no",
                 "empty: has no config.yaml", "none: is no folder"):  # fmt: skip
        assert f"warning: passed over: {tmp_path}/{part}" in err, err
    assert main(["compare", str(torn), f"out={tmp_path / 'no'}"]) == 2
    assert not (tmp_path / "no").exists()
    assert main(["compare"]) == 2
    assert "lowrank compare runs/*" in capsys.readouterr().err


def test_half_a_row_is_left_out_and_columns_may_be_missing(make_run: MakeRun) -> None:
    folder = make_run("killed", steps_done=12)
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text + "13,1300,5.")
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")][-1] == "12"
    assert read_run(folder).points[-1].step == 12
    (folder / "metrics.csv").write_text("step,tokens\n1,2\n")
    with pytest.raises(BrokenRun, match=r"no metrics\.csv with a finished update"):
        read_run(folder)
    (folder / "result.json").write_text(json.dumps({"tokens": 3}))
    with pytest.raises(BrokenRun, match="lacks val_perplexity, papers_val_perplexity, seconds"):
        read_run(folder)


def test_runs_that_answer_different_questions_are_warned_of(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = {**result_of()["hardware"], "device": "H100", "kind": "cuda"}
    runs = [
        make_run("a"),
        make_run("b", "data.seq_len=64", tokenizer_fingerprint="71" * 32),
        make_run("c", data_fingerprint="db" * 32, hardware=hardware),
    ]
    compared(tmp_path / "out", *runs)
    err = capsys.readouterr().err
    assert "not comparable: their tokenizers differ" in err and "70707070 (#1, #3); 71717171 (#2)" in err
    assert "not comparable: they were trained on different data" in err
    assert "not comparable: data.seq_len differs" in err and "128 (#1, #3); 64 (#2)" in err
    assert "different machines (A <fast> CPU x 1, 2 threads (#1, #2); H100 x 1 (#3))" in err
    assert warnings([read_run(runs[0]), read_run(make_run("d", "optim.lr=0.5"))]) == []


def test_where_a_checkout_lay_is_no_difference(make_run: MakeRun) -> None:
    here, there = make_run("here"), make_run("there")
    text = (there / "config.yaml").read_text()
    assert text.count("data/shakespeare/") == 3, "two files and a tokenizer"
    (there / "config.yaml").write_text(re.sub(r"\S*data/shakespeare/", "/opt/elsewhere/data/shakespeare/", text))
    assert differing([read_run(here), read_run(there)]) == {}


def test_keys_of_a_strategy_differ_only_among_its_runs(make_run: MakeRun) -> None:
    runs = [
        read_run(make_run(name, *words))
        for name, *words in (
            ("a", "strategy=galore", "strategy.subspace.rank=8"),
            ("b", "strategy=galore", "strategy.subspace.rank=16", "logger=tensorboard", "trainer.log_every_steps=3"),
            ("c", "strategy=sltrain", "strategy.weights.rank=4"),
        )
    ]
    assert differing(runs) == {
        "strategy.name": ["galore", "galore", "sltrain"],
        "strategy.subspace.rank": [8, 16, None],
    }
    groups = grouped(runs)
    assert {group.label: len(group.runs) for group in groups} == {"galore": 2, "sltrain": 1}
    assert best_lines(groups) == ["best of each:", "  galore: 50.00 with strategy.subspace.rank=8, of 2 runs"]


def test_one_kind_alone_is_named_by_what_was_tried(make_run: MakeRun) -> None:
    paths = [
        make_run(f"r{n}", f"optim.lr={lr}", f"seed={n}", val_perplexity=60.0 - n) for n, lr in ((1, 0.1), (2, 0.2))
    ]
    runs, broken = readable(paths)
    assert not broken
    assert [group.label for group in grouped(runs)] == ["seed 2, lr 0.2", "seed 1, lr 0.1"]
    assert [group.label for group in grouped([runs[0], runs[0]])] == ["r2"]


@pytest.mark.parametrize(
    "points, front",
    [
        ([(1.0, 9.0), (2.0, 5.0), (3.0, 7.0), (4.0, 4.0)], [(1.0, 9.0), (2.0, 5.0), (4.0, 4.0)]),
        ([(2.0, 5.0), (2.0, 4.0)], [(2.0, 4.0)]),
        ([(2.0, 5.0), (2.005, 4.0)], [(2.005, 4.0)]),
        ([(2.0, 5.0), (2.02, 4.0)], [(2.0, 5.0), (2.02, 4.0)]),
        ([], []),
    ],
)
def test_the_front_is_what_nothing_beats_in_both(
    points: list[tuple[float, float]], front: list[tuple[float, float]]
) -> None:
    assert pareto_front(points) == front


def test_memory_on_one_scale(make_run: MakeRun) -> None:
    """A CPU's figure is of the process with its libraries: then the plan's stands for all."""
    gpu = {**result_of()["hardware"], "kind": "cuda"}
    cpu_run, gpu_run = read_run(make_run("c")), read_run(make_run("g", hardware=gpu))
    for runs, name, first in (
        ([cpu_run, gpu_run], "planned", 40 << 20),
        ([gpu_run], "measured", 600 << 20),
        ([read_run(make_run("old", planned=None))], "measured", 600 << 20),
    ):
        what, memory = memory_of(runs)
        assert what.startswith(name) and memory(runs[0]) == first


def test_the_table_fits_a_terminal(make_run: MakeRun) -> None:
    runs, _ = readable([make_run("a" * 80), make_run("b", "strategy=full"), make_run("c", steps_done=9)])
    drawn = RichConsole(file=io.StringIO(), width=120, force_terminal=False)
    drawn.print(rich_table(runs))
    lines = drawn.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len([line for line in lines if "llama_1m" in line]) == 3, "a run takes one line"
    assert "9 of 40" in "\n".join(lines)
