"""The table of GLUE runs: medians over seeds, the best of the settings, the mean by its definition, and a paper's."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_train.cli import main
from lowrank_train.config import compose, save
from lowrank_train.config.files import load_container
from lowrank_train.data.glue import TASKS
from lowrank_train.report.compare import compare_sweep
from lowrank_train.report.glue_table import glue_report
from lowrank_train.report.published_tables import GLUE_PAPERS, glue_table_names
from lowrank_train.report.runs import RunRecord, read_run
from tests.report.conftest import result_of

Make = Callable[..., RunRecord]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A finished run of recipe glue/TASK_WING whose first metric ended at `last` and was `best` at its best."""

    def call(task: str, wing: str, seed: int, last: float, best: float, *words: str, done: bool = True) -> RunRecord:
        folder = tmp_path / f"{task}-{wing}-{seed}{''.join(words)}"
        folder.mkdir()
        save(compose([f"recipe=glue/{task}_{wing}", f"seed={seed}", *words]), folder / "config.yaml")
        (folder / "metrics.csv").write_text("step,tokens,train/loss,time/elapsed_sec,val/loss\n8,64,0.5,1.0,0.5\n")
        wanted = TASKS[task]

        def found(value: float) -> dict[str, dict[str, float | None]]:
            return {split: dict.fromkeys(wanted.metrics, value) for split in wanted.validation}

        result = {key: value for key, value in result_of().items() if "perplexity" not in key}
        result |= {
            "metrics": found(last), "best_metrics": found(best), "best_step": 4, "steps": 8, "updates_per_epoch": 4,
            "best_by": list(wanted.best_by), "commonest_label_metrics": None, "val_rows": 20,
        }  # fmt: skip
        if done:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return read_run(folder)

    return call


def cell(lines: list[str], title: str, row: str, column: str) -> str:
    """The cell of a table; columns are two spaces apart."""
    start = next(index for index, line in enumerate(lines) if title in line)
    header = [name.strip() for name in lines[start + 1].split("  ") if name.strip()]
    found = next(line for line in lines[start + 2 :] if line.startswith(row))
    return [part.strip() for part in found.split("  ") if part.strip()][header.index(column)]


def test_median_and_spread_over_seeds(make: Make) -> None:
    runs = [make("rte", "galore", seed, last, last + 0.1) for seed, last in ((1, 0.70), (2, 0.61), (3, 0.645))]
    lines = glue_report(runs, None)
    assert cell(lines, "last evaluation", "galore r4 roberta_base", "rte accuracy") == "64.50 [61.00, 70.00] x3"
    assert cell(lines, "best evaluation", "galore r4 roberta_base", "rte accuracy") == "74.50 [71.00, 80.00] x3"
    assert not any(line.startswith("mean") for line in lines)


def test_runs_that_differ_in_more_than_their_seed_are_not_mixed(make: Make) -> None:
    runs = [make("rte", "full", 1, 0.6, 0.6), make("rte", "full", 2, 0.62, 0.62)]
    runs += [make("rte", "full", seed, 0.7, 0.8, "optim.lr=1e-5") for seed in (1, 2)]
    lines = glue_report(runs, None)
    assert cell(lines, "best evaluation", "full roberta_base", "rte accuracy") == "80.00 [80.00, 80.00] x2"
    assert any("rte: lr 1e-05, best median of 2 settings" in line for line in lines)


def test_the_mean_says_what_it_is_the_mean_of(make: Make) -> None:
    runs = [make("rte", "lora", 1, 0.6, 0.6), make("mnli", "lora", 1, 0.8, 0.8), make("rte", "full", 1, 0.5, 0.5)]
    lines = glue_report(runs, None)
    assert cell(lines, "last evaluation", "lora r8 roberta_base", "mean") == "70.00"
    assert cell(lines, "last evaluation", "full roberta_base", "mean") == "-"
    assert "mean: of mnli matched accuracy, rte accuracy; given where a row has all 2" in lines


def test_published_figures_stand_beside_the_same_strategy_and_rank(make: Make) -> None:
    runs = [
        make("mrpc", "galore", 1, 0.9, 0.92),
        make("mrpc", "galore", 1, 0.9, 0.93, "strategy.subspace.rank=8"),
        make("mrpc", "galore", 1, 0.9, 0.93, "strategy.subspace.rank=16"),
        make("stsb", "full", 1, 0.9, 0.91),
    ]
    lines = glue_report(runs, "galore_glue")
    told = "\n".join(lines)
    assert "mrpc: 92.25 published; ours, best evaluation: accuracy 92.00, F1 92.00" in told
    assert "mrpc: 92.01 published; ours, best evaluation: accuracy 93.00, F1 93.00" in told
    assert "galore r16 roberta_base: no figure; it has full, galore r4" in told
    assert "stsb: none published; ours, best evaluation: Pearson 91.00" in told
    assert "its average: the mean of the eight columns" in told


def test_averages_of_the_published_table_are_those_of_its_columns() -> None:
    """Printed figures have two decimals, so that their mean is within 0.005 of its own rounding."""
    assert glue_table_names() == ["galore_glue"]
    published = load_container(GLUE_PAPERS / "galore_glue.yaml")
    whole = [figure for figure in published["figures"] if "cola" in figure]
    assert len(whole) == 2
    for figure in whole:
        columns = [value for name, value in figure.items() if name in TASKS]
        assert len(columns) == 8 and "wnli" not in figure
        assert sum(columns) / 8 == pytest.approx(figure["average"], abs=0.006)


def test_compare_writes_both_files_and_leaves_text_runs_to_their_table(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make("cola", "galore", 1, 0.5, 0.6), make("cola", "galore", 2, 0.5, 0.6, done=False)]
    out = tmp_path / "out"
    assert main(["compare", *(str(run.path) for run in runs), "paper=galore_glue", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "not finished" in printed and "60.35 published" in printed and "perplexity" not in printed
    with (out / "glue.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["metric"], row["last"], row["best"], row["rank"]) for row in rows] == [
        ("cola", "matthews", "0.5", "0.6", "4")
    ]
    assert (out / "glue.txt").read_text(encoding="utf-8") in printed


def test_a_sweep_ends_with_the_table_and_the_paper_of_its_jobs(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make("cola", "galore", 1, 0.5, 0.6, "paper=galore_glue")
    compare_sweep([run.path], tmp_path / "swept")
    assert "cola: 60.35 published; ours, best evaluation: Matthews 60.00" in capsys.readouterr().out


def test_a_paper_that_is_not_there(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = make("cola", "full", 1, 0.5, 0.6)
    assert main(["compare", str(run.path), "paper=galore_glu"]) == 2
    assert "galore_glue" in capsys.readouterr().err
