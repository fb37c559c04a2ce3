"""Sharded parameters: who serves which, what each process keeps, and the numbers of one process on two."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Size, Tensor

from lowrank_train.kernels.rounding import Rounding
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.muon import Muon
from lowrank_train.optim.natural import NaturalAdam
from lowrank_train.optim.owners import owner_of_each, rows_of, shared_out
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Slot, Transform
from tests.optim import sharded_ranks
from tests.optim.bytes_by_rank import state_bytes_by_rank
from tests.optim.sharded_ranks import ROUND, UPDATES, Case, cases
from tests.test_strategies import configured
from tests.two_processes import RANKS, on_two

GALORE = InSubspace(Svd(rank=3), Adam(), Backproject())
SLOT = Slot("layer.weight", seed=1, phase=0.0, dtype=torch.float32)


def test_work_is_shared_out_the_largest_first() -> None:
    assert shared_out([1, 7, 2, 5, 3], 2) == [1, 0, 0, 1, 1]  # 7 | 5, 3 beside the 5 (8), 2 beside the 7 (9), 1 (9)
    assert shared_out([4, 4, 4], 2) == [0, 1, 0]
    assert shared_out([], 3) == []


@pytest.mark.parametrize(("length", "count"), [(8, 2), (17, 2), (9, 8), (1, 2), (7, 3)])
def test_rows_are_those_of_torch_chunk(length: int, count: int) -> None:
    numbers = torch.arange(length)
    chunks = [*numbers.chunk(count), *[numbers[:0]] * count][:count]
    assert all(torch.equal(numbers[rows_of(length, rank, count)], chunks[rank]) for rank in range(count))


@pytest.mark.parametrize(
    ("rule", "shape", "apart"),
    [
        (Adam(), (17, 12), True),
        (Adam(), (12,), True),
        (Adam(), (1, 12), False),  # no row for the second rank
        (GALORE, (21, 12), True),
        (GALORE, (12, 21), False),  # projected from the left
        (InSubspace(Svd(rank=3), NaturalAdam(), Backproject()), (21, 12), False),
        (Muon(), (21, 12), False),
        (Stored(Adam(), Storage(min_elements=100)), (21, 12), False),  # codes whose blocks do not end with the rows
        (Stored(Adam(), Storage(min_elements=100)), (12,), True),  # too small for codes
    ],
)
def test_rows_are_served_apart_where_the_rule_treats_them_apart(
    rule: Transform, shape: tuple[int, ...], apart: bool
) -> None:
    (owner,) = owner_of_each([(torch.empty(shape, device="meta"), SLOT, rule)], 2, "nearest")
    assert owner == (None if apart else 0)


@pytest.mark.parametrize(("rounding", "owner"), [("nearest", None), ("compensated", None), ("stochastic", 0)])
def test_random_bits_are_drawn_for_a_whole_matrix(rounding: Rounding, owner: int | None) -> None:
    narrow = torch.empty(8, 4, dtype=torch.bfloat16, device="meta")
    assert owner_of_each([(narrow, SLOT, Adam())], 2, rounding) == [owner]


def test_bytes_by_rank_are_those_of_the_formulas() -> None:
    """Rows of 21 x 12 over two ranks: 11 and 10, with a common basis; 12 x 21 has one owner, the first."""
    members: list[tuple[Tensor, Slot, Transform]] = [
        (torch.empty(21, 12, device="meta"), SLOT, GALORE),
        (torch.empty(12, 21, device="meta"), SLOT, GALORE),
    ]
    basis, moments = 12 * 3, [2 * 11 * 3, 2 * 10 * 3]
    owned = 12 * 3 + 2 * 3 * 21
    assert state_bytes_by_rank(members, 2, "nearest") == [4 * (basis + moments[0] + owned), 4 * (basis + moments[1])]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of one pair of processes has found, of all strategies."""
    folder = tmp_path_factory.mktemp("sharded")
    configs = {name: dataclasses.asdict(configured(name)) for name in sorted({case.name for case in cases()})}
    on_two(sharded_ranks.main, configs, folder, folder=folder)
    of_ranks = [json.loads((folder / f"found{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    return {case: [of_rank[case] for of_rank in of_ranks] for case in of_ranks[0]}


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_two_processes_are_one(found: dict[str, list[dict[str, Any]]], case: Case) -> None:
    """The same numbers in float64, over moves of the bases, a gradient that is not finite in one rank's rows, clipping
    and micro-batches; and from a state that one process saved on two, and the other way."""
    seen, second = found[str(case)]
    # means of two halves are added up in another order; 8-bit codes and float32 inside some rules may turn over at it
    ways = {(rank, name): of[name] for rank, of in enumerate((seen, second)) for name in of if name.startswith("far ")}
    assert len(ways) == (5 if case.when == "after_backward" else 2)  # both ranks, and rank 1 from 2 to 1
    assert all(far < 1e-6 for far in ways.values()), ways
    assert json.dumps(seen["said"]) == json.dumps(second["said"])
    for said, alone in zip(seen["said"], seen["said alone"], strict=True):
        for key, value in alone.items():
            assert said[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    assert len(seen["said"]) == UPDATES
    if case.name in ("full", "galore", "galore_8bit", "muon", "fira"):  # where the matrix is trained in that update
        waits = case.when != "in_backward"  # till the step; compressed in between only where no basis is due
        assert seen["said"][1]["skipped_tensors"] == int(waits)
    if case.rounding is not None:
        assert all(said["lost_updates_pct"] is not None for said in seen["said"])


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_state_is_that_of_one_process_and_lies_once(found: dict[str, list[dict[str, Any]]], case: Case) -> None:
    seen, _ = found[str(case)]
    assert seen["state"] == seen["state alone"], "shapes, dtypes and integers of what is saved"
    if "active" not in str(seen["state"]):  # state that comes and goes is counted at its beginning
        assert seen["bytes"] == seen["counted"]
    assert seen["largest round"] <= max(ROUND, Size((21, 12)).numel()), "more than one matrix was whole at a time"
