"""A recipe beside another strategy: what goes along, what is left out with a note, and what stays a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.carrying import recipe_strategy

Faults = Callable[..., list[str]]


def composed(*words: str) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return compose(words, notes).strategy, notes


def test_rank_and_interval_go_along() -> None:
    strategy, notes = composed("recipe=galore_7b", "strategy=fira")
    assert (strategy.subspace["rank"], strategy.subspace["every"]) == (1024, 500)
    assert strategy.lift["_target_"].endswith("ScaledResidual")
    assert notes == []


def test_what_the_strategy_has_no_axis_for_is_left_out_with_a_note() -> None:
    strategy, notes = composed("recipe=galore_350m", "strategy=full")
    assert strategy.subspace is None
    assert [note.partition(" (")[0] for note in notes] == ["strategy.subspace.rank=256", "strategy.subspace.every=200"]
    assert all("(recipes/galore_350m.yaml, line " in note and "full has no subspace" in note for note in notes)


def test_what_the_strategy_sets_itself_stays() -> None:
    strategy, notes = composed("recipe=galore_350m", "strategy=ldadam")
    assert (strategy.subspace["rank"], strategy.subspace["every"]) == (256, 1)
    assert len(notes) == 1
    assert "strategy ldadam sets its own" in notes[0]
    strategy, notes = composed("recipe=galore_350m", "strategy=frugal")
    assert (strategy.subspace["rank"], strategy.subspace["density"]) == (None, 0.25)
    assert "strategy.subspace.rank=256" in notes[0]


def test_keys_of_the_run_go_with_any_strategy() -> None:
    strategy, notes = composed("recipe=galore_7b_4090", "strategy=fira")
    assert strategy.when == "in_backward"
    assert notes == []


def test_another_part_takes_the_numbers_it_has() -> None:
    strategy, notes = composed("recipe=galore_350m", "strategy/subspace=coordinates")
    assert (strategy.subspace["rank"], strategy.subspace["density"], strategy.subspace["every"]) == (256, None, 200)
    assert notes == []


def test_own_strategy_is_no_other() -> None:
    assert composed("recipe=galore_350m", "strategy=galore") == composed("recipe=galore_350m")


def test_a_number_written_for_another_class_is_left_out(own_yaml: Path) -> None:
    """GaLore's scale of 0.5 says nothing about APOLLO, which takes the root of its own."""
    recipe = own_yaml / "recipes" / "galore_60m.yaml"
    recipe.write_text(recipe.read_text().replace("strategy:\n", "strategy:\n  lift:\n    scale: 0.5\n", 1))
    assert recipe_strategy("galore_60m") == (
        "galore",
        {"strategy.lift.scale": 0.5, "strategy.subspace.rank": 128, "strategy.subspace.every": 200},
    )
    assert composed("recipe=galore_60m")[0].lift["scale"] == 0.5
    strategy, notes = composed("recipe=galore_60m", "strategy=apollo")
    assert strategy.lift["scale"] == 1.0
    assert "it was written for another lift" in notes[0]
    assert composed("recipe=galore_60m", "strategy=natural_galore")[0].lift["scale"] == 0.5


def test_recipe_that_builds_on_another_hands_its_keys_on(own_yaml: Path) -> None:
    text = (
        "# @package _global_\ndefaults:\n  - /recipe/galore_60m\n  - _self_\n\nstrategy:\n  subspace:\n    rank: 64\n"
    )
    (own_yaml / "recipes" / "smaller.yaml").write_text(text)
    notes = composed("recipe=smaller", "strategy=full")[1]
    assert [note.partition(" (")[0] for note in notes] == ["strategy.subspace.rank=64", "strategy.subspace.every=200"]
    assert composed("recipe=smaller", "strategy=fira")[0].subspace["rank"] == 64


def test_keys_of_the_command_line_are_never_left_out(faults: Faults) -> None:
    (found,) = faults("recipe=galore_350m", "strategy=full", "strategy.subspace.rank=8")
    assert found.startswith("strategy.subspace (command line): rank set, but no strategy/subspace chosen")
    assert faults("recipe=galore_350m", "strategy=full", "~strategy.subspace") == []


@pytest.mark.parametrize("word", ["~strategy/feedback", "strategy/feedback=null", "~strategy.feedback"])
def test_a_part_goes_with_its_keys(word: str) -> None:
    assert compose(["strategy=ldadam", word]).strategy.feedback is None


def test_the_later_of_rank_and_density_counts(faults: Faults) -> None:
    subspace = composed("strategy.subspace.density=0.1")[0].subspace
    assert (subspace["rank"], subspace["density"]) == (None, 0.1)
    subspace = composed("strategy=frugal", "strategy.subspace.rank=8")[0].subspace
    assert (subspace["rank"], subspace["density"]) == (8, None)
    assert any(
        "give one of them" in fault for fault in faults("strategy.subspace.density=0.1", "strategy.subspace.rank=8")
    )


def test_notes_go_to_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategy=full", "--cfg", "job"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: strategy.subspace.rank=32 (recipes/default.yaml, line ")
    assert "note:" not in captured.out
