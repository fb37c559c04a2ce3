"""Token shards on disk: tokenized documents that are sought in no time and need no tokenizing while training."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_train.config.errors import UserError
from lowrank_train.data.documents import IndexedSource, Slot
from lowrank_train.data.files import did_you_mean, find_local
from lowrank_train.data.tokenizer import Tokenizer

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One shard: `NAME.bin` (ids of all documents, one after another) and `NAME.offsets` (int64, documents + 1)."""

    name: str
    source: str  # name of the file it was made from
    documents: int
    tokens: int
    skipped: int  # documents of the source that could not be read
    dtype: str  # uint16 or uint32
    sha256: str  # of the ids
    offsets_sha256: str

    def paths(self, folder: Path) -> tuple[Path, Path]:
        """The file of ids and the file of offsets."""
        return folder / f"{self.name}.bin", folder / f"{self.name}.offsets"

    def fault(self, folder: Path, *, checksums: bool = False) -> str | None:
        """What is wrong with the files on disk, or None; without `checksums` only their sizes are compared."""
        sizes = (self.tokens * np.dtype(self.dtype).itemsize, (self.documents + 1) * 8)
        for path, size_bytes, digest in zip(self.paths(folder), sizes, (self.sha256, self.offsets_sha256), strict=True):
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size_bytes:
                return f"{path} has {path.stat().st_size} bytes instead of {size_bytes}"
            if checksums and file_sha256(path) != digest:
                return f"{path} does not have its checksum"
        return None


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_aside(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all: to a temporary name, flushed, then renamed."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def write_index(folder: Path, shards: Sequence[Shard], *, tokenizer: Tokenizer, tokenizer_name: str) -> None:
    """Writes the list of shards; a folder without it is not complete."""
    content = {
        "format": FORMAT,
        "tokenizer": tokenizer_name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    write_aside(folder / INDEX, (json.dumps(content, indent=1) + "\n").encode())


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `folder`/index.json.

    Raises:
        UserError: it is not there, not readable, or of another format.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
        assert content["format"] == FORMAT and content["shards"] is not None
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {INDEX}: not a folder of token shards, or its preparation was not finished "
                        f"(run the same `lowrank data prepare` again)") from error  # fmt: skip
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is damaged or of another format; make it again with `lowrank data prepare`") from error
    assert isinstance(content, dict)
    return content


class TokenShards(IndexedSource):
    """Documents of one or more folders made by `lowrank data prepare`, mapped into memory shard by shard."""

    def __init__(self, shards: Sequence[tuple[Path, Shard]]) -> None:
        super().__init__([str(folder / shard.name) for folder, shard in shards])
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(shard.documents for _, shard in shards))
        self.num_documents = self._ends[-1] if self._ends else 0
        self._mapped: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # a worker process maps for itself; else all would be read and sent

    @classmethod
    def open(cls, folders: Sequence[str], tokenizer: Tokenizer, *, key: str) -> TokenShards:
        """The shards of `folders`, after comparing their sizes and their tokenizer.

        Raises:
            UserError: a folder is missing, incomplete, damaged, or was made with another tokenizer.
        """
        if not folders:
            raise UserError(f"{key} is empty: give the folder that `lowrank data prepare` made")
        shards = []
        for name in folders:
            folder = find_local(name)
            if folder is None:
                raise UserError(f"{key}: there is no folder {name}{did_you_mean(name)}")
            index = read_index(folder)
            if index["tokenizer_fingerprint"] != tokenizer.fingerprint:
                raise UserError(
                    f"{key}: {folder} was tokenized with {index['tokenizer']}, which is not data.tokenizer; "
                    f"set data.tokenizer to it, or prepare the corpus again"
                )
            for entry in index["shards"]:
                shard = Shard(**entry)
                if (fault := shard.fault(folder)) is not None:
                    raise UserError(f"{key}: {fault}; run `lowrank data prepare` again, it makes only what is missing")
                shards.append((folder, shard))
        return cls(shards)

    def seen(self) -> list[str]:
        """A line for each shard, with the checksums its index gives."""
        pairs = zip(self.names, self._shards, strict=True)
        return [f"{name} with sha256 {shard.sha256} and {shard.offsets_sha256}" for name, (_, shard) in pairs]

    def slots(self, file: int, start: int = 0) -> Iterator[Slot]:
        for number in range(start, self._shards[file][1].documents):
            yield self._slot(file, number)

    def slot_of(self, number: int) -> Slot:
        file = bisect.bisect_right(self._ends, number)
        return self._slot(file, number - (self._ends[file - 1] if file else 0))

    def _slot(self, file: int, number: int) -> Slot:
        if file not in self._mapped:
            folder, shard = self._shards[file]
            ids_path, offsets_path = shard.paths(folder)
            # Without the class memmap: it makes each slice an object of its own, several times slower.
            self._mapped[file] = (
                np.asarray(np.memmap(ids_path, dtype=shard.dtype, mode="r")),
                np.asarray(np.memmap(offsets_path, dtype=np.int64, mode="r")),
            )
        ids, offsets = self._mapped[file]
        return Slot(file, number, ids[offsets[number] : offsets[number + 1]])

    def encode(self, slots: list[Slot]) -> list[list[int]]:
        return [slot.payload.tolist() for slot in slots]
