"""Published figures: readable, about things that exist here, and set beside ours with what differs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from lowrank_train.cli import main
from lowrank_train.config import UserError, compose, to_container
from lowrank_train.config.paths import group_choices
from lowrank_train.report.published_tables import (
    PAPERS,
    beside_published,
    differences,
    read_table,
    rows_of_an_update,
    table_names,
)
from lowrank_train.report.runs import flat, read_run
from tests.report.conftest import MakeRun

FIELDS = {"title", "source", "formula", "ours", "evidence", "notes", "settings", "models", "figures"}
CELL = {"strategy", "model", "perplexity", "loss", "memory", "label"}


@pytest.mark.parametrize("name", table_names())
def test_a_table_is_about_what_there_is(name: str) -> None:
    raw = yaml.safe_load((PAPERS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(raw) == FIELDS
    assert raw["source"].startswith("arXiv ") and raw["evidence"] and raw["title"]
    choices = group_choices()
    keys: dict[str, set[str]] = {}
    seen = set()
    for cell, figure in zip(raw["figures"], read_table(name).figures, strict=True):
        assert {key for key in cell if "." not in key} <= CELL
        assert figure.strategy in choices["strategy"] and figure.model in choices["model"]
        assert 1 < figure.perplexity < 3000 and ("perplexity" in cell) != ("loss" in cell)
        place = (figure.strategy, figure.model, figure.label)
        assert place not in seen, "two figures for one thing"
        seen.add(place)
        if figure.strategy not in keys:
            keys[figure.strategy] = set(flat(to_container(compose(["~recipe", f"strategy={figure.strategy}"]))))
        assert set(figure.settings) <= keys[figure.strategy], "settings are told in our keys"
    assert set(raw["models"]) <= {cell["model"] for cell in raw["figures"]}


@pytest.mark.parametrize(
    "name, strategy, model, label, perplexity, memory",
    [
        ("galore_table2", "galore", "llama_60m", "", 34.88, "0.24G"),
        ("galore_table2", "full", "llama_1b", "", 15.56, "7.80G"),
        ("galore_7b", "galore_8bit", "llama_7b", "after 150,000 updates", 14.65, "18G"),
        ("q_galore", "q_galore", "llama_350m", "", 19.79, "0.88G"),
        ("fira", "fira", "llama_130m", "", 22.73, "0.52G"),
        ("apollo", "apollo_mini", "llama_1b", "", 14.17, "2.60G"),
        ("relora_table2", "relora", "llama_250m", "", 22.48, None),
        ("sst", "sst", "llama_130m", "", 23.35, None),
        ("subtrack_table1", "subtrack", "llama_60m", "", math.exp(3.43), None),
        ("natural_galore", "natural_galore", "llama_350m", "", math.exp(2.93), None),
        ("sltrain", "sltrain", "llama_1b", "", 16.14, "4.16G"),
    ],
)
def test_figures_are_the_published_ones(
    name: str, strategy: str, model: str, label: str, perplexity: float, memory: str | None
) -> None:
    [found] = [f for f in read_table(name).figures if (f.strategy, f.model, f.label) == (strategy, model, label)]
    assert found.perplexity == pytest.approx(perplexity) and found.memory == memory


def test_the_recipe_of_a_published_run_differs_in_nothing_known(make_run: MakeRun) -> None:
    """What the table says of a run and what our recipe of it says are one thing."""
    for recipe, table in (
        ("galore_60m", "galore_table2"), ("galore_1b", "galore_table2"), ("sltrain_130m", "sltrain"),
        ("relora_60m", "galore_table2"),
    ):  # fmt: skip
        run = read_run(make_run(recipe, f"recipe={recipe}", positions=0))
        steps, length = run.settings["trainer.steps"], run.settings["data.seq_len"]
        assert run.result is not None
        run.result["positions"] = steps * length * rows_of_an_update(run.settings)
        [figure] = [
            f
            for f in read_table(table).figures
            if (f.strategy, f.model) == (run.settings["strategy.name"], run.settings["model.name"])
        ]
        assert differences(run, figure) == ["no known setting differs"], recipe


def test_ours_beside_theirs(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("recipe=galore_60m", "trainer.total_batch_size=256", "optim.lr=0.02", "data.seq_len=128", "precision=fp32")
    galore = make_run("galore", *words, papers_val_perplexity=38.368, val_perplexity=39.0)
    small = make_run("small")
    assert main(["compare", str(galore), str(small), "paper=galore_table2", f"out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    for part in (
        "arXiv 2403.03507, Table 2", "batch means over n + 1 batches",
        "38.37 by the papers' formula, 39.00 token-weighted; weights and state 0.000 GB",
        "published: 34.88, memory 0.24G; ours is 10.0% higher",
        "trainer.total_batch_size: 256 here, 512 there", "optim.lr: 0.02 here, 0.01 there",
        "data.seq_len: 128 here, 256 there", "precision.name: fp32 here, bf16 there",
        "positions, padding counted: 4.0k here, 1.31B there",
        "no figure of this table is for galore on llama_1m; it has galore on llama_60m, llama_130m, ",
    ):  # fmt: skip
        assert part in out, part
    assert "published: 34.88" in (tmp_path / "out" / "compare.txt").read_text(encoding="utf-8")


def test_the_formula_of_the_table_decides_which_of_ours_is_set_beside_it(make_run: MakeRun) -> None:
    run = read_run(make_run("r", "recipe=relora_250m", val_perplexity=24.728, papers_val_perplexity=20.0))
    said = "\n".join(beside_published([run], read_table("relora_table2")))
    assert "24.73 token-weighted, 20.00 by the papers' formula" in said and "ours is 10.0% higher" in said
    begun = read_run(make_run("b", "strategy=full", "model=llama_60m", steps_done=10))
    said = "\n".join(beside_published([begun], read_table("subtrack_table1")))
    assert "not finished; so far" in said and "published: 30.27 (loss 3.41)\n" in said + "\n"


def test_a_misspelt_table_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "nowhere", "paper=galore_tabel2"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean galore_table2?" in err and "apollo" in err and "nowhere" not in err
    with pytest.raises(UserError, match=r"There are: apollo, fira"):
        read_table("x")
    assert dataclasses.is_dataclass(read_table("fira"))
