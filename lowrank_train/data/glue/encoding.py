"""Texts and pairs of a GLUE split to token ids, with the marks that the tokenizer's own template puts around them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowrank_train.config.errors import UserError
from lowrank_train.data.glue.reading import GlueRow
from lowrank_train.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NO_LABEL = -100  # of a row that only fills a micro-batch
_TOGETHER = 4096  # rows tokenized at a time; of no consequence for the result

Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a split, in the order of its file."""

    ids: list[Ids]  # int32
    types: list[Ids] | None  # which text of the pair, where the model is told: int8
    labels: list[float]
    pad_id: int
    classes: bool  # labels are numbers of classes, not scores

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int], *, no_label: bool = False) -> dict[str, Any]:
        """Rows padded at their end to the longest of them.

        Gives input_ids, attention_mask (1 on tokens, 0 on pads) and, where the model is told, token_type_ids, all
        (rows, positions) int64; labels (rows,), int64 classes or float32 scores, NO_LABEL with `no_label`.
        """
        lengths = [len(self.ids[row]) for row in rows]
        shape = (len(rows), max(lengths))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[place, :length] = self.ids[row]
            mask[place, :length] = 1
            if self.types is not None:
                types[place, :length] = self.types[row]
        labels = [float(NO_LABEL) if no_label else self.labels[row] for row in rows]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.tensor(labels, dtype=torch.int64 if self.classes else torch.float32),
            "num_tokens": 0 if no_label else sum(lengths),
            "num_positions": input_ids.size,
        }
        return batch if self.types is None else batch | {"token_type_ids": torch.from_numpy(types)}


def encode(rows: Sequence[GlueRow], tokenizer: Tokenizer, *, seq_len: int, classes: bool, split: str) -> EncodedRows:
    """Token ids of all rows; one above `seq_len` is cut, a pair at its longer text first, as published scripts do.

    A tokenizer that puts no mark between the texts of a pair, as those of decoders may not, gets a line break there.

    Raises:
        UserError: the tokenizer has no pad token, or rows would be empty.
    """
    if tokenizer.pad_id is None:
        raise UserError(
            "data.tokenizer: has no pad token, and rows of a batch have different lengths; name one as pad_token in "
            'the tokenizer_config.json of its folder (such as "pad_token": "</s>"), or choose another tokenizer'
        )
    library = tokenizer.to_hugging_face()
    marks_pairs = library.num_special_tokens_to_add(pair=True) > library.num_special_tokens_to_add(pair=False)
    if seq_len <= library.num_special_tokens_to_add(pair=True):
        raise UserError(f"data.seq_len={seq_len}: leaves no room for text beside the tokenizer's own marks")
    texts = [row.texts if marks_pairs else ("\n".join(row.texts),) for row in rows]
    wants_types = "token_type_ids" in library.model_input_names
    ids: list[Ids] = []
    types: list[Ids] = []
    cut = 0
    for first in range(0, len(texts), _TOGETHER):
        part = texts[first : first + _TOGETHER]
        encoded = _call(library, part)
        long = [place for place, row in enumerate(encoded["input_ids"]) if len(row) > seq_len]
        cut += len(long)
        if long:
            shorter = _call(library, [part[place] for place in long], truncation=True, max_length=seq_len)
            for name, values in shorter.items():
                for place, row in zip(long, values, strict=True):
                    encoded[name][place] = row
        ids += [np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]
        if wants_types:
            types += [np.asarray(row, dtype=np.int8) for row in encoded["token_type_ids"]]
    if cut:
        log.warning("%s: %d of %d rows are longer than data.seq_len=%d and were cut", split, cut, len(rows), seq_len)
    empty = [number for number, row in enumerate(ids) if not len(row)]
    if empty:
        raise UserError(f"{split}: row {empty[0] + 1} has no token; this tokenizer adds no mark to an empty text")
    labels = [row.label for row in rows]
    return EncodedRows(ids, types if wants_types else None, labels, tokenizer.pad_id, classes)


def _call(library: Any, texts: Sequence[tuple[str, ...]], **cutting: Any) -> dict[str, list[list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = dict(library(*columns, padding=False, verbose=False, **cutting))
    backend = getattr(library, "backend_tokenizer", None)
    if backend is not None:  # it would go on cutting whatever it is given later
        backend.no_truncation()
    return encoded
