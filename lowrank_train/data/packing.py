"""Documents to rows: one document a row, cut and padded, or documents end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from lowrank_train.data.tokenizer import Tokenizer

IGNORED = -100  # the label torch's cross-entropy leaves out

Ids = TypeVar("Ids", int, np.ndarray[Any, Any])


def without_loss(token: Ids) -> Ids:
    """The id of a token that is read but not to be predicted: its complement -id - 1, and back again."""
    return ~token


def token_ids(document: Sequence[int]) -> list[int]:
    """The plain ids of a document some of whose tokens are without loss."""
    return [token if token >= 0 else without_loss(token) for token in document]


class Rows:
    """Rows of `seq_len` positions under construction: ids, labels and document numbers, all int64 arrays."""

    def __init__(self, count: int, seq_len: int, tokenizer: Tokenizer) -> None:
        # A tokenizer without a pad token: any id serves, because the label of a pad is never a target and causal
        # attention keeps what stands at the end of a row out of what comes before.
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0
        self.input_ids = np.full((count, seq_len), pad, dtype=np.int64)
        self.labels = np.full((count, seq_len), IGNORED, dtype=np.int64)
        self.document_ids = np.full((count, seq_len), -1, dtype=np.int32)

    def put(self, row: int, column: int, ids: Sequence[int] | np.ndarray[Any, Any], document: int) -> None:
        """Writes `ids`, a document or a piece of one, numbered `document` within its row; see `without_loss`."""
        end = column + len(ids)
        tokens = np.asarray(ids, dtype=np.int64)  # of an empty document too
        self.input_ids[row, column:end] = np.where(tokens < 0, without_loss(tokens), tokens)
        self.labels[row, column:end] = np.where(tokens < 0, IGNORED, tokens)
        self.document_ids[row, column:end] = document

    @property
    def num_tokens(self) -> int:
        """Positions that are not pads."""
        return int((self.document_ids >= 0).sum())

    def tensors(self, mask_documents: bool) -> dict[str, Any]:
        """`input_ids` and `labels` (rows, seq_len) int64; with `mask_documents` also `document_ids` int32, and then the
        first token of every document is no target, because nothing it may attend to predicts it."""
        labels = self.labels
        if mask_documents:
            starts = np.ones_like(self.document_ids, dtype=bool)
            starts[:, 1:] = self.document_ids[:, 1:] != self.document_ids[:, :-1]
            labels = np.where(starts, IGNORED, labels)
        batch = {"input_ids": torch.from_numpy(self.input_ids), "labels": torch.from_numpy(labels)}
        if mask_documents:
            batch["document_ids"] = torch.from_numpy(self.document_ids)
        return batch


def count_targets(labels: torch.Tensor) -> int:
    """Targets of a batch of unshifted labels (rows, seq_len): the first position of a row predicts nothing."""
    return int((labels[:, 1:] != IGNORED).sum())


def padded(ids: list[int], seq_len: int, eos_id: int | None) -> list[int]:
    """A document as one row: cut so that the end-of-sequence token always fits, as T5's tokenizer does for the papers
    (a document that was cut ends in it too)."""
    if not ids:
        return ids
    return ids[:seq_len] if eos_id is None else [*ids[: seq_len - 1], eos_id]


def ended(ids: list[int], eos_id: int | None) -> list[int]:
    """A document as it stands among others: closed by the end-of-sequence token."""
    return [*ids, eos_id] if ids and eos_id is not None else ids
