"""When which block is active: the orders, what is a block, and schedules that cannot be."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from lowrank_train.config.errors import UserError
from lowrank_train.optim.blocks import BlockSchedule, active_blocks
from tests.optim.methods import LAYERS, in_blocks, optimizer_of, toy_model


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
@pytest.mark.parametrize(("number", "size"), [(5, 2), (7, 3), (6, 1), (4, 4), (8, 5), (2, 1)])
def test_a_sweep_visits_all_before_any_comes_again(order: Any, number: int, size: int) -> None:
    visits = Counter(dict.fromkeys(range(number), 0))
    for turn in range(3 * number):
        active = active_blocks(turn, number, size, order, 1)
        assert len(active) == size
        visits.update(active)
        assert max(visits.values()) - min(visits.values()) <= 1


def test_orders() -> None:
    def turns(order: Any, number: int = 5, size: int = 2) -> list[list[int]]:
        return [sorted(active_blocks(turn, number, size, order, 3)) for turn in range(4)]

    assert turns("ascending") == [[0, 1], [2, 3], [0, 4], [1, 2]]
    assert turns("descending") == [[3, 4], [1, 2], [0, 4], [2, 3]]
    assert turns("mirror", number=6) == [[0, 5], [1, 4], [2, 3], [0, 5]]
    orders = {tuple(next(iter(active_blocks(turn, 9, 1, "random", seed))) for turn in range(9)) for seed in range(5)}
    assert len(orders) == 5
    assert (
        len({tuple(next(iter(active_blocks(9 * s + t, 9, 1, "random", 0))) for t in range(9)) for s in range(5)}) == 5
    )


def test_uniform_draws_know_nothing_of_each_other() -> None:
    """Each of 5 blocks is in 2/5 of the draws, and in 4/25 of all pairs of draws that follow each other."""
    draws = [active_blocks(turn, 5, 2, "uniform", 0) for turn in range(2000)]
    assert all(len(draw) == 2 for draw in draws)
    for block in range(5):
        assert sum(block in draw for draw in draws) / 2000 == pytest.approx(0.4, abs=0.05)
        both = sum(block in first and block in second for first, second in itertools.pairwise(draws))
        assert both / 1999 == pytest.approx(0.16, abs=0.04)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"count": 5}, "count is 5, but there are only 3 blocks"),
        ({"count": None, "density": 0.1}, "which of 3 blocks is none"),
        ({"count": None}, "either count or density"),
        ({"count": 1, "density": 0.5}, "either count or density"),
        ({"count": None, "density": 1.5}, "density is 1.5"),
        ({"every": 0}, "every is 0"),
        ({"patterns": [["0.*"], ["*"]]}, r"0\.weight is in 2 of strategy\.blocks\.patterns"),
        ({"patterns": [["0.*", "2.*"]]}, r"4\.weight is in 0 of"),
        ({"patterns": [["*"], ["mlp.*"]]}, r"\['mlp\.\*'\] match no selected parameter"),
    ],
)
def test_schedules_that_cannot_be_are_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        optimizer_of(in_blocks(**{"patterns": LAYERS} | keys)(), toy_model())


def test_names_without_a_layer_are_refused() -> None:
    with pytest.raises(UserError, match=r"0\.weight has no number of a layer"):
        optimizer_of(in_blocks(by="layers")(), toy_model())


def test_layers_by_the_names_that_models_give_them() -> None:
    schedule = BlockSchedule(count=1)
    names = (
        "model.layers.0.mlp.up_proj.weight",
        "transformer.h.0.ln.bias",
        "bert.encoder.layer.10.x",
        "h.10.x",
        "h.1.x",
    )
    blocks = [{name for name in names if schedule.is_active(name, names, turn, 0)} for turn in range(5)]
    assert sorted(map(sorted, blocks)) == sorted([name] for name in names)
