"""Readers of documents: JSON lines (C4's own form), plain text, and token shards; what cannot be read is reported."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.files import Listing, Truncated, expand, is_remote, read_lines
from lowrank_train.data.tokenizer import Tokenizer

TEXT_DOCUMENT_BYTES = 4096  # a plain-text document ends at the first blank line past this
TEXT_DOCUMENT_LIMIT_BYTES = 65536  # ... or, where there is none, at the first line end past this
CHECKED_SLOTS = 10_000  # places looked at for one good document before a corpus is refused


class Slot(NamedTuple):
    """One place of a document: file (index in `Source.files`), line (counted from 0), and what stands there."""

    file: int
    line: int
    payload: Any


class Fault(NamedTuple):
    """Something that was skipped: its kind and where it was (`file:line`, counted from 1)."""

    kind: str
    where: str


class Source(ABC):
    """The documents of a split, file after file. A slot whose document is bad stays a slot and has no tokens."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        names = [Path(file).name for file in self.files]
        self.names = names if len(set(names)) == len(names) else self.files
        self.faults: list[Fault] = []  # since the last `take_faults`

    @abstractmethod
    def slots(self, file: int, start: int = 0) -> Iterator[Slot]:
        """Slots of one file from line `start` on; reads on without interpreting what it skips."""

    @abstractmethod
    def encode(self, slots: list[Slot]) -> list[list[int]]:
        """Token ids of every slot, without special tokens; empty where there is no good document."""

    def document_id(self, slot: Slot) -> str:
        """`file:line`, as an editor counts lines; for plain text and token shards the line is the document's number."""
        return f"{self.names[slot.file]}:{slot.line + 1}"

    def seen(self) -> list[str]:
        """A line for each file: its name and, where it lies on this machine, its size in bytes."""
        sizes = ["" if is_remote(file) else f" of {Path(file).stat().st_size:,} bytes" for file in self.files]
        return [name + size for name, size in zip(self.names, sizes, strict=True)]

    def take_faults(self) -> list[Fault]:
        """What was skipped since the last call."""
        taken, self.faults = self.faults, []
        return taken

    def _fault(self, kind: str, slot: Slot) -> None:
        self.faults.append(Fault(kind, self.document_id(slot)))


class IndexedSource(Source):
    """Documents that have numbers, 0 to num_documents - 1 over all files, by which each is found at once."""

    num_documents: int

    @abstractmethod
    def slot_of(self, number: int) -> Slot:
        """The slot of a document by its number."""


class TextSource(Source):
    """What JSON lines and plain text share: slots hold bytes, which are decoded and then tokenized together."""

    def __init__(self, files: Sequence[str], tokenizer: Tokenizer, *, revision: str | None, key: str) -> None:
        super().__init__(files)
        self._tokenizer, self._revision, self._key = tokenizer, revision, key

    @abstractmethod
    def text(self, payload: bytes) -> str:
        """The document's text. Raises `BadDocument`."""

    def encode(self, slots: list[Slot]) -> list[list[int]]:
        texts, good = [], []
        for index, slot in enumerate(slots):
            try:
                texts.append(self.text(slot.payload))
                good.append(index)
            except BadDocument as error:
                self._fault(str(error), slot)
        ids: list[list[int]] = [[] for _ in slots]
        for index, encoded in zip(good, self._tokenizer.encode(texts), strict=True):
            ids[index] = encoded
            if not encoded:
                self._fault("empty text", slots[index])
        return ids

    def _lines(self, file: int, start: int) -> Iterator[tuple[int, bytes]]:
        line = start
        try:
            for raw in read_lines(self.files[file], start=start, revision=self._revision, key=self._key):
                yield line, raw
                line += 1
        except Truncated as error:
            self._fault(f"damaged file, read up to here ({error})", Slot(file, line, b""))
        except OSError as error:
            raise UserError(f"{self._key}: {self.files[file]} cannot be read: {error.strerror or error}") from error


class BadDocument(Exception):
    """A document that is skipped; the message is the kind of fault."""


class JsonLines(TextSource):
    """One JSON object a line with the text under `text_key`; C4's `text, timestamp, url` is one such form."""

    def __init__(self, files: Sequence[str], tokenizer: Tokenizer, *, text_key: str, **options: Any) -> None:
        super().__init__(files, tokenizer, **options)
        self.text_key = text_key

    def slots(self, file: int, start: int = 0) -> Iterator[Slot]:
        for line, raw in self._lines(file, start):
            if not raw.isspace():
                yield Slot(file, line, raw)

    def text(self, payload: bytes) -> str:
        try:
            document = json.loads(payload)
        except UnicodeDecodeError as error:
            raise BadDocument("not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise BadDocument("not JSON") from error
        if not isinstance(document, dict):
            raise BadDocument("not a JSON object")
        text = document.get(self.text_key)
        if not isinstance(text, str):
            raise BadDocument(f"no text under {self.text_key!r}")
        if not text.strip():
            raise BadDocument("empty text")
        return text


class PlainText(TextSource):
    """Plain UTF-8 text. A file of up to 4 kB is one document; a longer one is cut at the first blank line past every
    4 kB (without blank lines: at the first line end past 64 kB), so that ranks and workers have something to share."""

    def slots(self, file: int, start: int = 0) -> Iterator[Slot]:
        numbered = enumerate(group for group in self._groups(file) if not group.isspace())
        for number, group in itertools.islice(numbered, start, None):
            yield Slot(file, number, group)

    def _groups(self, file: int) -> Iterator[bytes]:
        lines: list[bytes] = []
        size_bytes = 0
        for _, raw in self._lines(file, 0):
            lines.append(raw)
            size_bytes += len(raw)
            at_blank_line = raw.isspace() and size_bytes >= TEXT_DOCUMENT_BYTES
            if at_blank_line or size_bytes >= TEXT_DOCUMENT_LIMIT_BYTES:
                yield b"".join(lines)
                lines, size_bytes = [], 0
        if lines:
            yield b"".join(lines)

    def text(self, payload: bytes) -> str:
        try:
            text = payload.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadDocument("not UTF-8") from error
        if "\0" in text:
            raise BadDocument("binary data")
        return re.sub(r"\r\n?", "\n", text).strip("\n")


def open_source(data: DataConfig, split: str, tokenizer: Tokenizer, listing: Listing | None = None) -> Source:
    """The documents of `data.train` or `data.validation`; `listing` of remote files where it is known already.

    Raises:
        UserError: the addresses name nothing, or token shards are of another tokenizer.
    """
    from lowrank_train.data.tokens import TokenShards

    key = f"data.{split}"
    addresses = data.train if split == "train" else data.validation
    if data.source == "tokens":
        return TokenShards.open(addresses, tokenizer, key=key)
    files = expand(addresses, key=key, source=data.source, revision=data.revision, listing=listing)
    if data.source == "text":
        return PlainText(files, tokenizer, revision=data.revision, key=key)
    return JsonLines(files, tokenizer, text_key=data.text_key, revision=data.revision, key=key)


def check_readable(source: Source, *, key: str) -> None:
    """Looks for one good document among the first ten thousand.

    Raises:
        UserError: there is none; says which files were read, what was wrong, and which keys the documents have.
    """
    everything = (slot for file in range(len(source.files)) for slot in source.slots(file))
    seen: list[Slot] = []
    for slot in itertools.islice(everything, CHECKED_SLOTS):
        if source.encode([slot])[0]:
            source.take_faults()
            return
        if len(seen) < 100:
            seen.append(slot)
    kinds = Counter(fault.kind for fault in source.take_faults())
    reasons = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()) or "the files are empty"
    files = ", ".join(source.files[:3]) + (f" and {len(source.files) - 3} more" if len(source.files) > 3 else "")
    message = f"{key}: no document can be read from {files}: {reasons}"
    if isinstance(source, JsonLines):
        message += _advice(source, seen)
    raise UserError(message)


def _advice(source: JsonLines, slots: list[Slot]) -> str:
    """What the keys or the first bytes of unreadable documents suggest."""
    keys: Counter[str] = Counter()
    for slot in slots:
        try:
            document = json.loads(slot.payload)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict):
            keys.update(name for name, value in document.items() if isinstance(value, str))
    if keys and source.text_key not in keys:
        near = difflib.get_close_matches(source.text_key, keys, n=1, cutoff=0.5)
        hint = f"; did you mean data.text_key={near[0]}?" if near else "; set data.text_key to one of them"
        return f". Keys with text there: {', '.join(keys)}{hint}"
    if slots and slots[0].payload.lstrip().startswith(b"["):
        return ". The file looks like one JSON array; write one object a line"
    if not keys and slots:
        return ". For plain text set data.source=text"
    return ""
