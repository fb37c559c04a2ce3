"""`lowrank plan fit=true` and `strategy=all`: every candidate is really planned, and the answer fits by a byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_train.cli import main
from lowrank_train.config import compose, paths
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory import all_strategies, fit_table, fitting
from lowrank_train.memory.cards import Card
from lowrank_train.memory.changes import axes, changed, refusal
from lowrank_train.memory.fitting import Search, written
from lowrank_train.memory.plan import planned

WORDS = (
    "recipe=null", "model.num_hidden_layers=1", "model.hidden_size=64", "model.intermediate_size=176",
    "model.vocab_size=96", "data.seq_len=32", "strategy=galore", "strategy.subspace.rank=16",
)  # fmt: skip


def configured(*words: str) -> RunConfig:
    return compose([*WORDS, *words, "task=plan"])


def needed(*words: str) -> int:
    return planned(configured(*words)).needed_bytes


def search(usable_bytes: int, *words: str) -> Search:
    return Search(configured(*words), Card("budget", usable_bytes, None))


def test_largest_micro_batch_is_found_to_the_byte() -> None:
    """The update of 12 rows in micro-batches of 1, 2, 3, 4, 6 or 12, with room for just 4, and for one byte less."""
    words = ("trainer.total_batch_size=12", "trainer.batch_size=12")
    room = needed("trainer.total_batch_size=12", "trainer.batch_size=4")
    for spare, rows in ((0, 4), (-1, 3)):
        found = search(room + spare, *words).fit()
        assert found.fits and found.plan is not None and found.larger is None
        assert (found.plan.rows, written(found.words)) == (rows, f"trainer.batch_size={rows}")
        assert found.tried == []


def test_room_beyond_the_update_is_another_run() -> None:
    room = needed("trainer.batch_size=9", "trainer.total_batch_size=9")
    found = search(room, "trainer.batch_size=4").fit()
    assert found.fits and found.words == {}
    assert found.larger is not None and (found.larger.rows, found.larger.micro_batches) == (9, 1)


def test_changes_come_in_their_order_and_needless_ones_go() -> None:
    """Where a single row does not fit; none of what remains can be left out."""
    words = ("trainer.batch_size=1", "trainer.total_batch_size=1")
    room = needed(*words, "strategy.when=project_in_backward")
    found = search(room, *words).fit()
    assert found.fits and found.plan is not None and found.plan.needed_bytes <= room
    order = [axis.name for axis in axes(configured(*words))]
    places = [order.index(tried.axis) for tried in found.tried]
    assert places == sorted(places)
    for key in found.words:
        fewer = {name: value for name, value in found.words.items() if name != key}
        assert planned(changed(configured(*words), fewer)).needed_bytes > room
    again = planned(compose([*WORDS, *words, *written(found.words).split(), "task=plan"]))
    assert again.needed_bytes == found.plan.needed_bytes


def test_nothing_fits_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fitting, "axes", lambda config: list(axes(config))[:1])
    assert main(["plan", *WORDS, "budget_gb=0.6", "fit=true"]) == 0
    out = capsys.readouterr().out
    assert "nothing known here fits. Nearest: " in out and "GB too much" in out
    assert "the command that fits" not in out


def test_refused_changes_are_skipped_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """in_backward knows no global norm to clip by."""
    monkeypatch.setattr(fitting, "axes", lambda config: list(axes(config))[1:2])
    found = search(1, "trainer.batch_size=1", "trainer.total_batch_size=2", "optim.grad_clip=1.0").fit()
    assert not found.fits
    [reason] = [reason for words, reason in found.refused.items() if "strategy.when=in_backward" in words]
    assert reason.startswith("optim.grad_clip=1.0: the global norm is known only after the last gradient")
    assert all(tried.words.get("strategy.when") != "in_backward" for tried in found.tried)


def test_words_mean_what_they_mean_on_the_command_line() -> None:
    config = configured()
    for axis in axes(config):
        for change in axis.changes:
            if refusal(changed(config, change.words), 96) is None:
                assert changed(config, change.words) == configured(*written(change.words).split()), change.words


def test_every_choice_of_storage_and_precision_is_offered() -> None:
    offered = [
        word for axis in axes(configured("precision=fp32")) for change in axis.changes for word in change.words.items()
    ]
    for key, present in (("strategy/storage", set()), ("precision", {"fp32"})):
        files = {path.stem for path in (paths.CONF / key).glob("*.yaml")}
        assert {value for name, value in offered if name == key} == files - present


def test_json_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "trainer.batch_size=4", "card=4090", "fit=true", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["words"] == []
    assert found["command"] == " ".join(["lowrank train", *WORDS, "trainer.batch_size=4"])
    assert found["plan"]["fits"] is True and found["largest_update_rows"] == 4 * fitting.LARGEST_UPDATE


def test_the_command_replaces_what_it_changes() -> None:
    room = needed("trainer.total_batch_size=4", "trainer.batch_size=2")
    found = search(room, "trainer.total_batch_size=4", "trainer.batch_size=4").fit()
    given = ["recipe=x", "trainer.batch_size=4", "budget_gb=1", "fit=true", "task=plan"]
    assert fit_table.command(found, given) == "lowrank train recipe=x trainer.batch_size=2"


def test_fit_needs_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "fit=true"]) == 2
    assert "fit=true: needs what it is to fit; give card=NAME" in capsys.readouterr().err


def test_all_strategies_are_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three in place of all: one of them has a rank above the short side of these matrices."""
    choices = {"strategy": ["apollo_mini", "full", "galore"]}
    monkeypatch.setattr(all_strategies, "group_choices", lambda: choices)
    words = [word for word in WORDS if not word.startswith("strategy")]
    assert main(["plan", *words, "strategy=all", "card=4090", "format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in rows][-1] == "galore" and "refused" in rows[-1]
    assert rows[0]["peak_bytes"] <= rows[1]["peak_bytes"]
    for row in rows[:2]:
        alone = planned(compose([*words, f"strategy={row['strategy']}", "task=plan"]))
        assert (row["peak_bytes"], row["persistent_bytes"]) == (alone.peak_bytes, alone.persistent_bytes)
        assert row["weights_bytes"] + row["state_bytes"] + row["bases_bytes"] == alone.persistent_bytes
        assert row["fits"] is True
    assert main(["plan", *words, "strategy=all", "card=4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("  yes")] == [row["strategy"] for row in rows[:2]]


def test_all_is_no_strategy_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "strategy=all", f"output_dir={tmp_path}"]) == 2
    assert "strategy=all: there is no such choice" in capsys.readouterr().err
