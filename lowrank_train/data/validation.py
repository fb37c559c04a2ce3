"""Validation rows, which are the same rows in the same order however they are batched and shared among ranks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank_train.config.schema import DataConfig
from lowrank_train.data.chat import ExampleValidation, open_examples
from lowrank_train.data.dealing import Dealing
from lowrank_train.data.documents import Source
from lowrank_train.data.lanes import Deal, concatenated_batches, padded_batches
from lowrank_train.data.order import Place
from lowrank_train.data.packing import Rows, count_targets
from lowrank_train.data.ranks import open_for_ranks
from lowrank_train.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_ROWS_TOGETHER = 32  # rows tokenized at a time; of no consequence for the result


class ValidationBatches:
    """Iterable over the validation batches of one rank; the rows are tokenized once and kept (2 or 4 bytes a token).

    Rows come in the order of the documents and end with the row that reaches `data.validation_tokens` targets; row i
    belongs to rank i mod world size.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, batch_size: int, rank: int, world_size: int) -> None:
        self._data, self._tokenizer, self._batch_size = data, tokenizer, batch_size
        self._rank, self._world_size = rank, world_size
        self._source: Source = open_for_ranks(data, "validation", tokenizer, world_size)
        self._kept: list[list[np.ndarray[Any, Any]]] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields {"input_ids", "labels"} and, with `mask_documents`, "document_ids": (rows, seq_len)."""
        if self._kept is None:
            self._kept = list(self._rows())[self._rank :: self._world_size]
        for first in range(0, len(self._kept), self._batch_size):
            part = self._kept[first : first + self._batch_size]
            rows = Rows(len(part), self._data.seq_len, self._tokenizer)
            for row, pieces in enumerate(part):
                column = 0
                for document, piece in enumerate(pieces):
                    rows.put(row, column, piece, document)
                    column += len(piece)
            yield rows.tensors(self._data.mask_documents)

    def _rows(self) -> Iterator[list[np.ndarray[Any, Any]]]:
        """All rows of all ranks, each a list of its documents' pieces."""
        data = self._data
        one_pass = DataConfig(**{**vars(data), "shuffle_documents": 0, "repeat": False, "mask_documents": True})
        deal = Deal(one_pass, self._source, self._tokenizer, _ROWS_TOGETHER, seed=0, dealing=Dealing(1))
        pad = data.packing == "pad"
        batches = padded_batches(deal, Place(), 0) if pad else concatenated_batches(deal, Place(), 0, 0)
        dtype = np.uint16 if self._tokenizer.vocab_size <= 2**16 else np.uint32
        targets = 0
        skipped: Counter[str] = Counter()
        for batch in batches:
            skipped.update(fault.kind for fault in batch["faults"])
            for ids, documents in zip(batch["input_ids"].numpy(), batch["document_ids"].numpy(), strict=True):
                pieces = [
                    ids[documents == document].astype(dtype) for document in range(int(documents.max(initial=-1)) + 1)
                ]
                if not pieces:
                    continue
                if data.validation_tokens is not None and targets >= data.validation_tokens:
                    return
                row = Rows(1, data.seq_len, self._tokenizer)
                column = 0
                for document, piece in enumerate(pieces):
                    row.put(0, column, piece, document)
                    column += len(piece)
                targets += count_targets(row.tensors(data.mask_documents)["labels"])
                yield pieces
        for kind, count in skipped.items():
            log.warning("validation: skipped %d: %s", count, kind)


def validation_batches(
    data: DataConfig, tokenizer: Tokenizer, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> ValidationBatches | ExampleValidation:
    """The validation rows of one rank; the last batch may be smaller. Build it once and iterate it at every evaluation.

    Raises:
        UserError: the corpus names nothing or nothing readable.
    """
    if data.source == "chat":
        return ExampleValidation(
            open_examples(data, "validation", tokenizer), data, tokenizer, batch_size, rank, world_size
        )
    return ValidationBatches(data, tokenizer, batch_size, rank, world_size)
