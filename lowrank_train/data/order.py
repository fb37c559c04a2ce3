"""The one global order of documents, and places in it from which to go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lowrank_train.data.documents import Slot, Source


@dataclass(frozen=True, slots=True)
class Place:
    """Where a walk through the corpus stands. All of it is needed to go on, and nothing else is."""

    epoch: int = 0
    block: int = 0  # blocks since the epoch began
    file: int = 0  # where the block begins: the how-manieth file of this epoch, ...
    line: int = 0  # ... and the line in it
    offset: int = 0  # documents of the block that are done
    documents: int = 0  # documents that are done since the walk began, over all epochs

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    def after(self) -> Place:
        """The place behind the document that stands here."""
        return Place(self.epoch, self.block, self.file, self.line, self.offset + 1, self.documents + 1)


def permutation(count: int, name: str) -> list[int]:
    """0..count-1 in an order that depends on `name` alone, on every machine and in every version of anything."""
    return sorted(range(count), key=lambda index: hashlib.blake2b(f"{name}/{index}".encode(), digest_size=8).digest())


class Order:
    """Files in order and lines in order; with `block_documents` N > 0, files are permuted in every epoch and then every
    N documents among themselves. Each epoch holds every document once."""

    def __init__(self, source: Source, files: list[int], *, block_documents: int, repeat: bool, seed: int) -> None:
        self._source, self._files = source, files
        self._shuffle, self._block = block_documents > 0, max(1, block_documents)
        self._repeat, self._seed = repeat, seed

    def walk(self, place: Place, mine: Callable[[int], bool]) -> Iterator[tuple[Place, Slot]]:
        """Yields (place of the document, document) from `place` on, for documents whose number is `mine`.

        The number of a document is `Place.documents`. The walk ends with the corpus, or never with `repeat`; it ends,
        too, after a whole epoch without any document.
        """
        while True:
            empty = True
            for first, block in self._blocks(place):
                empty = False
                start = first.offset
                order = permutation(len(block), self._name(first.epoch, first.block)) if self._shuffle else [0]
                for offset in range(start, len(block)):
                    number = first.documents + offset - start
                    if mine(number):
                        slot = block[order[offset]]
                        yield Place(first.epoch, first.block, first.file, first.line, offset, number), slot
                place = Place(first.epoch, first.block, first.file, first.line, len(block), number_after(first, block))
            if not self._repeat or (empty and place.offset == 0):
                return
            place = Place(epoch=place.epoch + 1, documents=place.documents)

    def _blocks(self, place: Place) -> Iterator[tuple[Place, list[Slot]]]:
        """Blocks of the epoch from `place` on; the first comes with `place` itself, as part of it may be done."""
        files = self._files
        if self._shuffle:
            files = [files[index] for index in permutation(len(files), self._name(place.epoch, "files"))]
        first = place
        block: list[Slot] = []
        for number in range(place.file, len(files)):
            for slot in self._source.slots(files[number], place.line if number == place.file else 0):
                if not block and first is not place:
                    first = Place(first.epoch, first.block, number, slot.line, 0, first.documents)
                block.append(slot)
                if len(block) == self._block:
                    yield first, block
                    first = Place(first.epoch, first.block + 1, 0, 0, 0, number_after(first, block))
                    block = []
        if block:
            yield first, block

    def _name(self, epoch: int, part: int | str) -> str:
        return f"{self._seed}/{epoch}/{part}/{self._files[0]}"


def number_after(first: Place, block: list[Slot]) -> int:
    """How many documents are done when the rest of `block` is, which begins at `first`."""
    return first.documents + len(block) - first.offset
