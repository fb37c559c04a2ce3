"""Two ranks are one process: every yes of the support page for DDP, projected gradients and FSDP2."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.optim import sharded_ranks, two_ranks
from tests.optim.two_ranks import CODED, STORED, WARM
from tests.test_strategies import STRATEGIES, configured
from tests.two_processes import RANKS, on_two
from tests.yeses import yeses

PAGE_NAME = {"before": "ddp", "gradients": "ddp", "projected": "ddp_projected", "sharded": "fsdp"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What both processes have found, by case; all cases share one pair of them."""
    folder = tmp_path_factory.mktemp("ranks")
    configs = {name: dataclasses.asdict(configured(name)) for name in STRATEGIES}
    on_two(two_ranks.main, configs, folder, folder=folder)
    first, second = (json.loads((folder / f"found{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS))
    return {case: first[case] | second[case] for case in first}


def test_two_ranks_are_one_process(found: dict[str, dict[str, Any]]) -> None:
    """To the last bit between ranks; to one process 1e-9 of the way in float64, whose sums are in another order.

    DLRT's bases make 2e-12 of it, all others less than 4e-13; codes of 8 bits do not turn over at such differences.
    """
    assert {case: result for case, result in found.items() if result["apart"] > 0 or result["far"] > 1e-9} == {}


def test_every_yes_of_the_page_was_run(found: dict[str, dict[str, Any]]) -> None:
    """None is left out. Whole weights in rows are run by the other program, each of whose cases is a test."""
    run = {(PAGE_NAME[shared], name, when) for name, when, shared in (case.split("-") for case in found)}
    run |= {("fsdp", case.name, case.when) for case in sharded_ranks.cases()}
    run = {case for case in run if case[1] not in (WARM, CODED, *STORED)}
    assert run == {(way, *yes) for way in ("ddp", "ddp_projected", "fsdp") for yes in yeses(way)}


def test_what_is_trained_changed_in_the_middle(found: dict[str, dict[str, Any]]) -> None:
    """Parameters have come, gone or changed their shape where a strategy does that."""
    assert {result["restructured"] for result in found.values()} == {"", "as told"}
