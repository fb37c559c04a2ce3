"""Evaluations in which a forward pass needs all ranks: the same number of batches on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class LevelBatches:
    """A rank's validation batches with empty ones behind them, so that all ranks have the same number.

    A forward pass gathers parameters from all ranks, and one with a batch more than the others would wait for ever.
    """

    def __init__(self, batches: Any, gather: Callable[[int], list[int]]) -> None:
        """`gather` gives the numbers of all ranks; called on all of them at once."""
        self._batches = batches
        self._count = max(gather(sum(1 for _ in batches)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count = 0
        for batch in self._batches:
            count += 1
            yield batch
        for _ in range(count, self._count):
            yield {"input_ids": torch.zeros(1, 2, dtype=torch.long), "labels": torch.full((1, 2), -100)}
