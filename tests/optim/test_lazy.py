"""Lazy refresh: the clock of the published code, the measure of how far a basis has turned, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.subspace.coordinates import Coordinates
from lowrank_train.optim.subspace.dct import Dct
from lowrank_train.optim.subspace.lazy import Lazy
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.subspace.random import Gaussian
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Slot, State, counter

SHAPES = [(12, 7), (7, 12), (9, 9), (11, 4)]


def moves(lazy: Lazy, overlap: float, every: int, updates: int) -> list[int]:
    """The updates, counted from 0, before which a basis moves whose overlap is always the same."""
    state = lazy.init(every) | {"refreshes": 0}
    due, found = 0, []
    for update in range(updates):
        if update == due:
            found.append(update)
            if counter(state, "refreshes") > 0:
                lazy.remember(overlap, state)
            state["refreshes"] = counter(state, "refreshes") + 1
            due = lazy.next_move(state, update)
    assert all(isinstance(value, int) for value in state.values())
    return found


def test_clock_of_the_published_code() -> None:
    """With 5 overlaps the interval doubles at every move, and moves fall on its multiples: some waits are shorter."""
    expected = [0, 200, 400, 600, 800, 1000, 1200, 1600, 3200, 6400]
    assert moves(Lazy(measure="published"), 0.5, 200, 6401) == expected


def test_clock_of_ours_waits_whole_intervals() -> None:
    assert moves(Lazy(window=2), 0.5, 10, 100) == [0, 10, 20, 40, 80]
    assert moves(Lazy(window=2, longest=20), 0.5, 10, 100) == [0, 10, 20, 40, 60, 80]
    assert moves(Lazy(window=2, growth=1.5), 0.5, 10, 80) == [0, 10, 20, 35, 57]


@pytest.mark.parametrize("measure", ["subspace", "published"])
def test_threshold_above_one_is_the_fixed_interval(measure: Any) -> None:
    assert moves(Lazy(threshold=1.01, window=1, measure=measure), 1.0, 7, 50) == list(range(0, 50, 7))


def refreshed(subspace: Subspace, gradients: list[Tensor]) -> State:
    """The state after a move for each gradient, however long the interval."""
    state = subspace.init(gradients[0], Slot("w", 3, 0.0, gradients[0].dtype)) | {"updates_done": 0}
    for update, grad in enumerate(gradients):
        subspace.schedule_next(state, update, subspace.refresh(grad.clone(), state))
    return state


def lazily(subspace: Subspace, **arguments: Any) -> Subspace:
    subspace.be_lazy(Lazy(**({"window": 1} | arguments)))
    return subspace


def overlap_of(state: State) -> float:
    return counter(state, "overlap_0") / 10**9


@pytest.mark.parametrize("shape", SHAPES)
def test_overlap_of_the_same_space_is_one_whatever_signs_and_order(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, sizes, right = torch.linalg.svd(grad, full_matrices=False)
    sizes[0] = sizes[1] * 0.99  # the first two change places, and all change signs
    turned = -(left * sizes) @ right
    signs_rules: list[Any] = ["aligned", "raw"]
    for signs in signs_rules:
        state = refreshed(lazily(Svd(rank=3, signs=signs)), [grad, turned])
        assert overlap_of(state) == pytest.approx(1.0, abs=1e-8)
        published = refreshed(lazily(Svd(rank=3, signs=signs), measure="published"), [grad, turned])
        assert abs(overlap_of(published)) < 0.1  # which takes it for a wholly different space


@pytest.mark.parametrize("shape", SHAPES)
def test_overlap_of_orthogonal_spaces_is_below_zero(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    first, second = (left[:, part] @ right[part] for part in (slice(0, 2), slice(2, 4)))
    state = refreshed(lazily(Svd(rank=2)), [first, second])
    chance = 2 / min(shape)
    assert overlap_of(state) == pytest.approx(-chance / (1 - chance), abs=1e-8)


def test_overlap_of_random_spaces_is_zero_on_average() -> None:
    """The share that any two spaces have in common, R / d, counts for nothing, however large it is."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        pair = [torch.randn(20, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
        found.append(overlap_of(refreshed(lazily(Svd(rank=12)), pair)))
    assert abs(sum(found) / len(found)) < 0.05
    assert min(found) < 0 < max(found)


def test_whole_space_never_turns() -> None:
    pair = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert overlap_of(refreshed(lazily(Svd(rank=4)), pair)) == 1.0


@pytest.mark.parametrize("storage", ["state", "int8", "int4"])
def test_interval_grows_where_the_space_stays(storage: Any) -> None:
    """One gradient always, and a new one always; a basis kept in few bits tells the two apart as well."""
    generator = torch.Generator().manual_seed(0)
    steady = [torch.randn(30, 20, generator=generator)] * 4
    restless = [torch.randn(30, 20, generator=generator) for _ in range(4)]
    intervals = [
        counter(refreshed(lazily(Svd(rank=4, every=5, storage=storage), window=2), each), "interval")
        for each in (steady, restless)
    ]
    assert intervals == [20, 5]


def test_zero_gradient_is_no_overlap() -> None:
    """A gradient that is zero moves nothing, is not remembered, and is tried again at the next update."""
    grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    subspace = lazily(Svd(rank=2, every=5), window=2)
    state = refreshed(subspace, [grad, grad])
    remembered = {key: value for key, value in state.items() if key.startswith("overlap")}
    subspace.schedule_next(state, 9, subspace.refresh(torch.zeros(8, 5), state))
    assert state["refresh_at"] == 10
    assert {key: value for key, value in state.items() if key.startswith("overlap")} == remembered


@pytest.mark.parametrize(
    ("subspace", "reason"),
    [
        (Online(rank=2), "clock of its own"),
        (Dct(rank=2), "clock of its own"),
        (Gaussian(rank=2), "orthonormal"),
        (Svd(rank=2, side="full"), "side=full"),
        (Coordinates(of="entries"), "one side"),
    ],
    ids=str,
)
def test_what_cannot_be_lazy_says_why(subspace: Subspace, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        subspace.be_lazy(Lazy())


@pytest.mark.parametrize("name", ["window", "growth", "longest"])
def test_wrong_values_name_the_key(name: str) -> None:
    values: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"strategy.refresh.{name}"):
        Lazy(**values)
