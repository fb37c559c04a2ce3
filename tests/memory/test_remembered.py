"""An output that is made again is in shape, memory and type what torch gives for real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.memory.fake_run import fake_run
from lowrank_train.memory.remembered import Remembered
from lowrank_train.memory.watch import fake_world
from tests.memory.test_plan import CASES, VOCABULARY, configured

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x @ x.mT,
    "scaled": lambda x: x * 2,
    "power": lambda x: x**2,
    "view": lambda x: x.view(-1),
    "transposed": lambda x: x.mT,
    "part": lambda x: x[1:, ::2],
    "pieces": lambda x: x.split(2),
    "rows": lambda x: x.unbind(),
    "in place": lambda x: x.mul_(2),
    "of a part in place": lambda x: x[1:].add_(1),
    "other type": lambda x: x.to(torch.bfloat16),
    "decomposition": lambda x: torch.linalg.svd(x, full_matrices=False),
    "codes": lambda x: x.view(torch.uint8),
    "compared": lambda x: x > 0,
    "largest": lambda x: x.max(dim=1),
    "expanded": lambda x: x[:1].expand(3, -1),
    "chosen": lambda x: x[torch.zeros(4, dtype=torch.int64)],
    "made": lambda x: torch.empty(3, 2, dtype=torch.float16),
}


def shown(x: Tensor, out: Any) -> list[Any]:
    """All of it that may matter; whose memory it is as a yes or no."""
    found = list(out) if isinstance(out, list | tuple) else [out]
    return [type(out).__name__ if len(found) > 1 else ""] + [
        (
            one.shape, one.stride(), one.storage_offset(), one.dtype, one is x, one.untyped_storage().nbytes(),
            one.untyped_storage()._cdata == x.untyped_storage()._cdata,
        )
        for one in found
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 7)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_second_time_is_as_torch_does_it(name: str, shape: tuple[int, int]) -> None:
    real = torch.zeros(shape)
    expected = shown(real, OPERATIONS[name](real))
    with fake_world(on_a_card=False):
        x = torch.zeros(shape)
        for _ in range(3):
            assert shown(x, OPERATIONS[name](x)) == expected


def test_equal_numbers_of_other_types_are_other_operations() -> None:
    with fake_world(on_a_card=False):
        x = torch.zeros(3, dtype=torch.int64)
        for _ in range(2):
            assert [(x * number).dtype for number in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize("case", ["q8", "project_in_backward"])
def test_a_run_shows_the_same_without_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(*CASES[case])
    found = fake_run(config, VOCABULARY)
    monkeypatch.setattr(Remembered, "__call__", lambda _, func, args, kwargs: func(*args, **kwargs))
    assert found == fake_run(config, VOCABULARY)
