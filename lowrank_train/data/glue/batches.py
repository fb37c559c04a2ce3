"""Micro-batches of a GLUE task for one rank: a seeded order in every epoch, and a position to go on from exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.glue.encoding import EncodedRows, encode
from lowrank_train.data.glue.reading import GlueRow, read_split, splits_of, task_of
from lowrank_train.data.order import permutation
from lowrank_train.data.tokenizer import Tokenizer


class GlueBatches:
    """Endless micro-batches of one rank.

    An update takes the next `batch_size` x `micro_batches` x `world_size` rows of the epoch's order; the last of an
    epoch takes what is left, so that an epoch holds every row once. Row i of an update belongs to rank i mod
    `world_size`. Where nothing is left for a micro-batch, a row without a label stands in it.
    """

    def __init__(
        self,
        rows: EncodedRows,
        name: str,
        *,
        batch_size: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        position: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """`name` and `seed` decide the order; `position` is that of the last micro-batch of an update.

        Raises:
            UserError: `position` belongs to another task, other rows or another seed.
        """
        self._rows, self._name, self._seed = rows, name, seed
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._rank, self._world_size = rank, world_size
        self._identity = {"task": name, "rows": len(rows), "seed": seed}
        saved = [position] if isinstance(position, dict) else list(position or [])
        for one in saved[:1]:  # every rank stands at the same place
            for key, value in self._identity.items():
                if one.get(key) != value:
                    raise UserError(
                        f"resume: the checkpoint's place is in {one.get('rows')} rows of {one.get('task')} in the "
                        f"order of seed {one.get('seed')}, and this run has {len(rows)} rows of {name} in that of seed "
                        f"{seed}; give the same data and seed, or start anew with resume=false"
                    )
        self._epoch: int = saved[0]["epoch"] if saved else 0
        self._row: int = saved[0]["row"] if saved else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields micro-batches; `window_targets` counts the rows with labels of the update on this rank."""
        size = self._batch_size * self._micro_batches * self._world_size
        epoch, begin = self._epoch, self._row
        while True:
            order = permutation(len(self._rows), f"{self._seed}/{epoch}/{self._name}")
            while begin < len(order):
                window = order[begin : begin + size]
                begin += len(window)
                mine = window[self._rank :: self._world_size]
                position = self._identity | {"epoch": epoch, "row": begin}
                for number in range(self._micro_batches):
                    part = mine[number * self._batch_size : (number + 1) * self._batch_size]
                    batch = self._rows.batch(part or window[:1], no_label=not part)
                    batch["documents"] = [f"{self._name} {row}" for row in part]
                    yield batch | {"window_targets": len(mine), "position": position, "exhausted": False}
            epoch, begin = epoch + 1, 0


class GlueValidation:
    """The rows that are evaluated, by split: every rank evaluates all of them, for no split is large."""

    def __init__(self, splits: dict[str, EncodedRows], batch_size: int) -> None:
        self.splits = splits
        self._batch_size = batch_size

    def batches(self, split: str) -> Iterator[dict[str, Any]]:
        """All rows of a split, those of similar length together; the last batch may be smaller."""
        rows = self.splits[split]
        order = sorted(range(len(rows)), key=lambda row: len(rows.ids[row]))
        for first in range(0, len(order), self._batch_size):
            yield rows.batch(order[first : first + self._batch_size])


def load_rows(data: DataConfig, tokenizer: Tokenizer) -> tuple[EncodedRows, dict[str, EncodedRows], str]:
    """Training rows, rows to evaluate by split, and the fingerprint of the former. UserError for what is wrong."""
    training = read_split(data, "train")
    evaluated = {split: encoded_rows(data, read_split(data, split), tokenizer, split) for split in splits_of(data)}
    return encoded_rows(data, training, tokenizer, "train"), evaluated, glue_fingerprint(data, training)


def encoded_rows(data: DataConfig, rows: Sequence[GlueRow], tokenizer: Tokenizer, split: str) -> EncodedRows:
    """The rows as ids, cut to `data.seq_len`."""
    return encode(rows, tokenizer, seq_len=data.seq_len, classes=bool(task_of(data).labels), split=split)


def glue_fingerprint(data: DataConfig, rows: Sequence[GlueRow]) -> str:
    """sha256 over the texts and labels in their order: the same rows have the same one in any form of file."""
    digest = hashlib.sha256(f"glue {data.task}".encode())
    for row in rows:
        digest.update("\0".join(("", *row.texts, repr(row.label))).encode())
    return digest.hexdigest()
