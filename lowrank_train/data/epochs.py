"""Rows in memory in a seeded order for each epoch, dealt to updates and ranks, with a place to go on from exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.data.order import permutation


class EpochWindows:
    """The rows of one update after the other, endlessly, as numbers: all ranks' together, and this rank's.

    An update takes the next `batch_size` x `micro_batches` x `world_size` rows of the epoch's order; the last of an
    epoch takes what is left, so that an epoch holds every row once. Row i of an update belongs to rank i mod
    `world_size`. A place in this order does not depend on how many ranks there are.
    """

    def __init__(
        self,
        rows: int,
        name: str,
        *,
        identity: dict[str, Any],
        fault: Callable[[dict[str, Any]], str],
        batch_size: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        position: dict[str, Any] | Sequence[dict[str, Any]] | None,
    ) -> None:
        """`name` and `seed` decide the order, `identity` says which rows these are.

        Raises:
            UserError: `position`, of the last micro-batch of an update, is in other rows or another order; its text is
                what `fault` makes of that position.
        """
        self._rows, self._name, self._seed = rows, name, seed
        self._rank, self._world_size = rank, world_size
        self._size = batch_size * micro_batches * world_size
        self._identity = identity | {"seed": seed}
        saved = [position] if isinstance(position, dict) else list(position or [])
        for one in saved[:1]:  # every rank stands at the same place
            if any(one.get(key) != value for key, value in self._identity.items()):
                raise UserError(fault(one))
        self._epoch: int = saved[0]["epoch"] if saved else 0
        self._row: int = saved[0]["row"] if saved else 0

    def __iter__(self) -> Iterator[tuple[list[int], list[int], dict[str, Any]]]:
        """Yields the rows of an update, those of this rank, and the place behind it."""
        epoch, begin = self._epoch, self._row
        while True:
            order = permutation(self._rows, f"{self._seed}/{epoch}/{self._name}")
            while begin < len(order):
                window = order[begin : begin + self._size]
                begin += len(window)
                yield window, window[self._rank :: self._world_size], self._identity | {"epoch": epoch, "row": begin}
            epoch, begin = epoch + 1, 0
