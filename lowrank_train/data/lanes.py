"""Lanes: the consumers a corpus is dealt to. Each yields finished micro-batches that say where the lane stands."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.dealing import Dealing
from lowrank_train.data.documents import IndexedSource, Slot, Source
from lowrank_train.data.order import Order, Place
from lowrank_train.data.packing import Rows, count_targets, ended, padded
from lowrank_train.data.shuffle import ShuffledOrder
from lowrank_train.data.tokenizer import Tokenizer

ENCODED_TOGETHER = 32  # documents: enough for a batched tokenizer to be fast, few enough to be read again on resume


@dataclass(frozen=True)
class Deal:
    """Everything a lane needs besides its own place; picklable, as it goes to worker processes."""

    data: DataConfig
    source: Source
    tokenizer: Tokenizer
    batch_size: int
    seed: int
    dealing: Dealing

    def order(self, files: list[int]) -> Order | ShuffledOrder:
        """The walk through `files`, or through all documents where they are shuffled all together."""
        if self.data.shuffle_documents == "all":
            assert isinstance(self.source, IndexedSource), "the checks of the configuration see to it"
            return ShuffledOrder(self.source, repeat=self.data.repeat, seed=self.seed)
        return Order(
            self.source,
            files,
            block_documents=self.data.shuffle_documents,
            repeat=self.data.repeat,
            seed=self.seed,
        )

    def batch(self, rows: Rows, documents: list[Slot]) -> dict[str, Any]:
        """A micro-batch of `rows`, in which `documents` began."""
        batch = rows.tensors(self.data.mask_documents)
        batch["num_positions"] = batch["input_ids"].numel()
        batch["num_tokens"] = rows.num_tokens
        batch["num_targets"] = count_targets(batch["labels"])
        batch["faults"] = self.source.take_faults()
        batch["exhausted"] = False
        if self.data.log_documents:
            batch["documents"] = [self.source.document_id(slot) for slot in documents]
        return batch

    def exhausted(self) -> dict[str, Any]:
        """A micro-batch of pads alone."""
        empty = self.batch(Rows(self.batch_size, self.data.seq_len, self.tokenizer), [])
        return empty | {"exhausted": True}


def padded_batches(deal: Deal, start: Place, lane: int) -> Iterator[dict[str, Any]]:
    """Micro-batches of one document a row: group g of `batch_size` documents from `start` on goes to lane g mod lanes.

    A document that cannot be read leaves its row empty, so that which rows belong to whom never depends on content.
    `batch["place"]` is the place in the global order behind the group.
    """
    size = deal.batch_size

    def mine(number: int) -> bool:
        return ((number - start.documents) // size) % deal.dealing.lanes == lane

    def make(group: list[tuple[Place, Slot]]) -> dict[str, Any]:
        rows = Rows(size, deal.data.seq_len, deal.tokenizer)
        ids = deal.source.encode([slot for _, slot in group])
        for row, document in enumerate(ids):
            rows.put(row, 0, padded(document, deal.data.seq_len, deal.tokenizer.eos_id), 0)
        good = [slot for (_, slot), document in zip(group, ids, strict=True) if document]
        return deal.batch(rows, good) | {"place": group[-1][0].after().as_dict()}

    group: list[tuple[Place, Slot]] = []
    for place, slot in deal.order(list(range(len(deal.source.files)))).walk(start, mine):
        group.append((place, slot))
        if len(group) == size:
            yield make(group)
            group = []
    if group:
        yield make(group)


def concatenated_batches(deal: Deal, start: Place, token: int, lane: int) -> Iterator[dict[str, Any]]:
    """Micro-batches of a lane's documents end to end, each closed by the end-of-sequence token.

    Which documents are the lane's is said by `deal.dealing`. `start` and `token` say at which token of which document
    to begin; `batch["place"]` and `batch["token"]` say the same for what comes next.
    """
    dealing = deal.dealing
    files = dealing.files(lane, len(deal.source.files))
    walk = deal.order(files).walk(start, lambda document: dealing.takes(lane, document))
    begun = dealing.begun(lane) | ({start.documents: token} if token else {})
    queue: deque[tuple[Place, Slot, list[int]]] = deque()
    token = 0
    size, seq_len = deal.batch_size, deal.data.seq_len
    next_place = start

    def refill() -> bool:
        first_epoch = None
        while not queue:
            read = list(itertools.islice(walk, ENCODED_TOGETHER))
            if not read:
                return False
            first_epoch = read[0][0].epoch if first_epoch is None else first_epoch
            encoded = deal.source.encode([slot for _, slot in read])
            for (place, slot), ids in zip(read, encoded, strict=True):
                if ids:
                    queue.append((place, slot, ended(ids, deal.tokenizer.eos_id)))
            if not queue and read[-1][0].epoch > first_epoch + 1:
                raise UserError("data.train: a whole epoch of one worker's files has no readable document")
        return True

    while True:
        rows = Rows(size, seq_len, deal.tokenizer)
        began: list[Slot] = []
        for row in range(size):
            column = document = 0
            while column < seq_len and (queue or refill()):
                place, slot, ids = queue[0]
                if token == 0:
                    token = begun.pop(place.documents, 0)
                    began += [slot] if token == 0 else []
                piece = ids[token : token + seq_len - column]
                rows.put(row, column, piece, document)
                column, token, document = column + len(piece), token + len(piece), document + 1
                next_place = place
                if token == len(ids):
                    queue.popleft()
                    token, next_place = 0, place.after()
        batch = deal.batch(rows, began)
        if batch["num_tokens"] == 0:
            return
        yield batch | {"place": next_place.as_dict(), "token": token}
