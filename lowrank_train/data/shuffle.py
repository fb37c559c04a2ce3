"""A shuffle of a whole corpus in no memory: one keyed permutation of the documents' numbers for each epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from lowrank_train.data.documents import IndexedSource, Slot
from lowrank_train.data.order import Place

ROUNDS = 8
"""Of the network: four make it hard to tell from a random permutation (Luby and Rackoff 1988); more cost little."""
LOOKED_AT = 4096  # numbers of documents that are dealt and permuted together; of no consequence for the order


class EpochPermutation:
    """0..count-1 in an order that depends on `name` alone, each number on its own and without a table.

    A Feistel network over pairs (l, r) in Z_a x Z_b with a b >= count, adding keyed hashes of one half to the other in
    turn, and walking on from what falls at or beyond `count` until something falls below: Black and Rogaway, Ciphers
    with Arbitrary Finite Domains (CT-RSA 2002). a = ceil(sqrt(count)), so that less than a + 1 numbers are beyond.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._a = math.isqrt(max(0, count - 1)) + 1
        self._b = max(1, -(-count // self._a))
        digest = hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers at `places`, int64 of any shape (places,), all below `count`."""
        found = self._network(places.astype(np.uint64))
        while (beyond := found >= self._count).any():
            found[beyond] = self._network(found[beyond])
        return found.astype(np.int64)

    def _network(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = numbers // b, numbers % b
        for turn, key in enumerate(self._keys):
            if turn % 2 == 0:
                left = (left + _hashed(right, key) % a) % a
            else:
                right = (right + _hashed(left, key) % b) % b
        return left * b + right


def _hashed(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """64 well mixed bits of each number under a key: the finaliser of splitmix64 (Steele, Lea, Flood 2014), twice."""
    for _ in range(2):
        numbers = (numbers ^ key) + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers = numbers ^ (numbers >> np.uint64(31))
    return numbers


class ShuffledOrder:
    """Every document of an indexed corpus in an order of its own in each epoch; a place in it is reached at once."""

    def __init__(self, source: IndexedSource, *, repeat: bool, seed: int) -> None:
        self._source, self._repeat, self._seed = source, repeat, seed

    def walk(self, place: Place, mine: Callable[[int], bool]) -> Iterator[tuple[Place, Slot]]:
        """As `Order.walk`, the whole epoch being one block: (place of the document, document) for those that are
        `mine`; the others are not looked at."""
        count = self._source.num_documents
        while count:
            shuffled = EpochPermutation(count, f"{self._seed}/{place.epoch}")
            behind = place.documents - place.offset  # documents of the epochs before
            for first in range(place.offset, count, LOOKED_AT):
                wanted = [at for at in range(first, min(count, first + LOOKED_AT)) if mine(behind + at)]
                for at, number in zip(wanted, shuffled(np.array(wanted, dtype=np.int64)).tolist(), strict=True):
                    yield Place(place.epoch, offset=at, documents=behind + at), self._source.slot_of(number)
            if not self._repeat:
                return
            place = Place(place.epoch + 1, documents=behind + count)
