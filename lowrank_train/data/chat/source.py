"""The examples of a split: read, checked, encoded and cut before training, and what became of them in a sentence."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.chat.rows import EncodedRow, Form, RowEncoder, recognised
from lowrank_train.data.chat.template import BadRow
from lowrank_train.data.files import Truncated, expand, read_lines
from lowrank_train.data.packing import without_loss
from lowrank_train.data.tokenizer import Tokenizer

MOST_TOLD = 5  # faulty rows that are named; the others are counted


class Example(NamedTuple):
    """One example as it is trained on."""

    name: str  # file:line, as an editor counts lines
    tokens: array[int]  # ids; see packing.without_loss for those that are not to be predicted
    prompt_length: int  # tokens before the completion; of a text 1


class Examples:
    """All examples of a split, closed by their end mark and no longer than a row.

    One that is longer than `seq_len` tokens is cut at its end, and then has no end mark. One with nothing to predict,
    from the start or in what the cut leaves, is left out. Both are counted.
    """

    def __init__(self, seq_len: int, *, on_all: bool) -> None:
        self._seq_len, self._on_all = seq_len, on_all
        self.examples: list[Example] = []
        self.forms: list[Form] = []  # of the files
        self.conversational = False  # whether a chat template was used
        self.num_tokens = self.num_targets = self.largest_id = 0
        self.num_cut = 0
        self.left_out: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.examples)

    def add(self, name: str, row: EncodedRow) -> None:
        """Take an example in, or count why not."""
        ids, completion = row.ids[: self._seq_len], row.completion[: self._seq_len]
        # Nothing of an example precedes its first token, by which it could be predicted.
        wanted = [False, *([True] * (len(ids) - 1) if self._on_all else completion[1:])]
        if not any(wanted):
            cut = any(row.completion[1:])
            self.left_out[f"no completion within {self._seq_len} tokens" if cut else "an empty completion or text"] += 1
            return
        self.num_cut += len(ids) < len(row.ids)
        self.num_tokens += len(ids)
        self.num_targets += sum(wanted)
        self.largest_id = max(self.largest_id, *ids)
        if row.remark:
            self.remarks[row.remark] += 1
        tokens = array("i", (id_ if loss else without_loss(id_) for id_, loss in zip(ids, wanted, strict=True)))
        self.examples.append(Example(name, tokens, completion.index(True) if any(completion) else len(ids)))

    def sentence(self) -> str:
        """How many examples there are, and what was cut or left out."""
        forms = " and ".join(dict.fromkeys(form.replace("_", " and ") for form in self.forms))
        told = [
            f"{len(self):,} examples ({forms}) of {self.num_tokens:,} tokens, {self.num_targets:,} of them to predict"
        ]
        if self.num_cut:
            told.append(f"{self.num_cut:,} cut at their end to data.seq_len={self._seq_len}, without an end mark")
        told += [f"{count:,} left out: {kind}" for kind, count in self.left_out.items()]
        told += [f"{count:,} {remark}" for remark, count in self.remarks.items()]
        return "; ".join(told)


def open_examples(data: DataConfig, split: str, tokenizer: Tokenizer) -> Examples:
    """The examples of `data.train` or `data.validation`, in the order of the files.

    Raises:
        UserError: rows are not what their form asks for, with their lines; or no example has something to predict.
    """
    key = f"data.{split}"
    files = expand(
        data.train if split == "train" else data.validation, key=key, source=data.source, revision=data.revision
    )
    found = Examples(data.seq_len, on_all=data.loss_on == "all")
    encoder = RowEncoder(tokenizer, text_key=data.text_key)
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else files
    faults = [
        fault for file, name in zip(files, names, strict=True) for fault in _read(found, file, name, encoder, data)
    ]
    if faults:
        more = [f"{key}: {len(faults) - MOST_TOLD:,} more rows are faulty"] if len(faults) > MOST_TOLD else []
        raise UserError([*(f"{key}: {fault}" for fault in faults[:MOST_TOLD]), *more])
    if not found.examples:
        why = ", ".join(f"{count:,} have {kind}" for kind, count in found.left_out.items())
        raise UserError(
            f"{key}: {', '.join(names[:3])} holds no example with something to predict: "
            + (f"{why}; raise data.seq_len, or look at the rows" if why else "there are no rows")
        )
    found.conversational = encoder.uses_template
    return found


def _read(found: Examples, file: str, name: str, encoder: RowEncoder, data: DataConfig) -> list[str]:
    """Take in all rows of a file; what is wrong with them, in words."""
    faults: list[str] = []
    form: Form | None = None if data.format == "auto" else data.format
    for line, raw in enumerate(_lines(file, data), start=1):
        if raw.isspace():
            continue
        try:
            row = _parsed(raw)
            form = form or recognised(row, data.text_key)
            found.add(f"{name}:{line}", encoder.encode(row, form, needs_reply=data.loss_on == "completion"))
        except BadRow as error:
            faults.append(f"{name}, line {line}: {error}")
            if form is None:
                break  # all other rows would be told the same
    found.forms += [form] if form is not None else []
    return faults


def _lines(file: str, data: DataConfig) -> Iterator[bytes]:
    try:
        yield from read_lines(file, revision=data.revision, key="data.train or data.validation")
    except Truncated as error:
        raise UserError(f"{file} is damaged ({error}); fetch or make it again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw)
    except UnicodeDecodeError as error:
        raise BadRow("is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        hint = "; the file looks like one JSON array, write one object a line" if raw.lstrip()[:1] == b"[" else ""
        raise BadRow(f"is not JSON{hint}") from error
    if not isinstance(row, dict):
        hint = "; write one object a line" if isinstance(row, Sequence) and not isinstance(row, str) else ""
        raise BadRow(f"is not a JSON object{hint}")
    return row
