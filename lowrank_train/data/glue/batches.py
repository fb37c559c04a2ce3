"""Micro-batches of a GLUE task for one rank: a seeded order in every epoch, and a position to go on from exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_train.config.schema import DataConfig
from lowrank_train.data.epochs import EpochWindows
from lowrank_train.data.glue.encoding import EncodedRows, encode
from lowrank_train.data.glue.reading import GlueRow, read_split, splits_of, task_of
from lowrank_train.data.tokenizer import Tokenizer


class GlueBatches:
    """Endless micro-batches of one rank, in the order of EpochWindows.

    Where nothing is left for a micro-batch, a row without a label stands in it.
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
        self._rows, self._name = rows, name
        self._batch_size, self._micro_batches = batch_size, micro_batches

        def fault(saved: dict[str, Any]) -> str:
            return (
                f"resume: the checkpoint's place is in {saved.get('rows')} rows of {saved.get('task')} in the order of "
                f"seed {saved.get('seed')}, and this run has {len(rows)} rows of {name} in that of seed {seed}; give "
                "the same data and seed, or start anew with resume=false"
            )

        self._windows = EpochWindows(
            len(rows),
            name,
            identity={"task": name, "rows": len(rows)},
            fault=fault,
            batch_size=batch_size,
            micro_batches=micro_batches,
            rank=rank,
            world_size=world_size,
            seed=seed,
            position=position,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields micro-batches; `window_targets` counts the rows with labels of the update on this rank."""
        for window, mine, position in self._windows:
            for number in range(self._micro_batches):
                part = mine[number * self._batch_size : (number + 1) * self._batch_size]
                batch = self._rows.batch(part or window[:1], no_label=not part)
                batch["documents"] = [f"{self._name} {row}" for row in part]
                yield batch | {"window_targets": len(mine), "position": position, "exhausted": False}


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
