"""Micro-batches of examples for one rank: a seeded order in every epoch, and a position to go on from exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lowrank_train.config.schema import DataConfig
from lowrank_train.data.chat.filling import fill_rows
from lowrank_train.data.chat.source import Example, Examples
from lowrank_train.data.epochs import EpochWindows
from lowrank_train.data.packing import Rows, count_targets
from lowrank_train.data.tokenizer import Tokenizer

OTHER_EXAMPLES = (
    "data.train: the checkpoint was made with other examples, another way to lay them out in rows, or another seed, "
    "and its place in them means nothing here; give the same data, or start anew with resume=false"
)
ROUNDED_TO = 8  # tokens: padded rows end at the longest of a micro-batch, in whole tiles of a matrix product


class RowTable:
    """Examples laid out in rows: one in each (packing=pad), or as many whole ones as fit (packing=whole)."""

    def __init__(self, examples: Sequence[Example], data: DataConfig, tokenizer: Tokenizer) -> None:
        self._examples, self._data, self._tokenizer = examples, data, tokenizer
        whole = data.packing == "whole"
        lengths = [len(example.tokens) for example in examples]
        self.rows = fill_rows(lengths, data.seq_len) if whole else [[index] for index in range(len(examples))]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int], size: int) -> dict[str, Any]:
        """`size` rows, those of `numbers` and empty ones: "input_ids", "labels" (rows, positions), and counts."""
        placed = [[self._examples[index] for index in self.rows[number]] for number in numbers]
        longest = max((sum(len(example.tokens) for example in row) for row in placed), default=1)
        padded = min(self._data.seq_len, -(-longest // ROUNDED_TO) * ROUNDED_TO)
        rows = Rows(size, self._data.seq_len if self._data.packing == "whole" else padded, self._tokenizer)
        for row, examples in enumerate(placed):
            column = 0
            for document, example in enumerate(examples):
                rows.put(row, column, np.asarray(example.tokens), document)
                column += len(example.tokens)
        batch = rows.tensors(self._data.mask_documents and self._data.packing == "whole")
        batch["num_positions"] = batch["input_ids"].numel()
        batch["num_tokens"] = rows.num_tokens
        batch["num_targets"] = count_targets(batch["labels"])
        if self._data.log_documents:
            batch["documents"] = [example.name for row in placed for example in row]
        return batch


class ExampleBatches:
    """Endless micro-batches of one rank, in the order of EpochWindows."""

    def __init__(
        self,
        table: RowTable,
        *,
        identity: dict[str, Any],
        batch_size: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        position: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """`identity` says which rows these are; `position` is that of the last micro-batch of an update.

        Raises:
            UserError: `position` belongs to other rows or another seed.
        """
        self._table, self._batch_size = table, batch_size
        self._starts = range(0, batch_size * micro_batches, batch_size)
        self._windows = EpochWindows(
            len(table),
            "examples",
            identity=identity,
            fault=lambda saved: OTHER_EXAMPLES,
            batch_size=batch_size,
            micro_batches=micro_batches,
            rank=rank,
            world_size=world_size,
            seed=seed,
            position=position,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields micro-batches; `window_targets` counts the targets of the update on this rank."""
        for _, mine, position in self._windows:
            batches = [self._table.batch(mine[at : at + self._batch_size], self._batch_size) for at in self._starts]
            targets = sum(batch.pop("num_targets") for batch in batches)
            for batch in batches:
                yield batch | {"window_targets": targets, "position": position, "exhausted": False}


class ExampleValidation:
    """Iterable over the validation batches of one rank; row i belongs to rank i mod world size.

    The examples are those in the order of the files up to `data.validation_tokens` targets; the rows do not depend on
    how they are batched.
    """

    def __init__(
        self, found: Examples, data: DataConfig, tokenizer: Tokenizer, batch_size: int, rank: int, world_size: int
    ) -> None:
        taken, targets = [], 0
        for example in found.examples:
            if data.validation_tokens is not None and targets >= data.validation_tokens:
                break
            taken.append(example)
            targets += sum(token >= 0 for token in example.tokens)
        self._table = RowTable(taken, data, tokenizer)
        self._batch_size = batch_size
        self._mine = list(range(len(self._table)))[rank::world_size]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields {"input_ids", "labels"} and, with `mask_documents`, "document_ids": (rows, positions)."""
        for first in range(0, len(self._mine), self._batch_size):
            numbers = self._mine[first : first + self._batch_size]
            yield self._table.batch(numbers, len(numbers))


def rows_identity(found: Examples, data: DataConfig) -> dict[str, Any]:
    """What a position in the rows of these examples must agree with."""
    digest = hashlib.sha256(f"{data.packing} {data.seq_len}".encode())
    for example in found.examples:
        digest.update(example.tokens.tobytes())
    return {"examples": len(found), "content": digest.hexdigest()[:16]}


def unigram_perplexity_of(training: Examples, validation: Examples, vocab_size: int) -> float:
    """Perplexity of the validation targets under add-one smoothed frequencies of the training targets."""
    counts = np.ones(max(vocab_size, training.largest_id + 1, validation.largest_id + 1), dtype=np.int64)
    for example in training.examples:
        np.add.at(counts, [token for token in example.tokens if token >= 0], 1)
    log_probability = np.log(counts / counts.sum())
    total = sum(log_probability[[token for token in one.tokens if token >= 0]].sum() for one in validation.examples)
    return float(np.exp(-total / validation.num_targets))
