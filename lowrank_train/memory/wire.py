"""What collective operations put on the wire, by the algorithms of rings: bytes that one rank sends.

Sources: NVIDIA's nccl-tests, doc/PERFORMANCE.md, whose factors of the bus bandwidth these are; the ring all-reduce is
that of Patarasuk and Yuan (Bandwidth optimal all-reduce algorithms, 2009). Trees, which NCCL takes for small messages,
send as much in all; switches that add up on the way (NVLink SHARP) send less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"]

FACTORS: dict[Collective, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,  # a reduce-scatter, then an all-gather
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,  # every chunk but one's own passes by
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0 if ranks > 1 else 0.0,  # handed on; the last in the chain sends nothing
    "all_to_all": lambda ranks: (ranks - 1) / ranks,  # what is for oneself stays
}
"""Bytes that a rank sends, at most, for each byte of the payload, by the number of ranks."""


@dataclass(frozen=True)
class Message:
    """Something that is sent again and again. The payload is

    all_reduce, broadcast: the tensor that is handed over, the same shape on every rank;
    reduce_scatter: the whole tensor that each rank hands over, of which it gets a part back;
    all_gather: the whole tensor that each rank ends with, of which it has handed over a part;
    all_to_all: what one rank hands over for all, the mean of the ranks.
    """

    what: str
    collective: Collective
    payload_bytes: float  # each time
    times: float  # in an update, in the mean of a long run

    def sent_bytes(self, ranks: int) -> float:
        """What a rank sends in an update, in the mean of a long run."""
        return FACTORS[self.collective](ranks) * self.payload_bytes * self.times


def sent_bytes(messages: Iterable[Message], ranks: int) -> float:
    """All of it together."""
    return sum(message.sent_bytes(ranks) for message in messages)


def added_up(messages: Iterable[Message]) -> list[Message]:
    """One of each kind: those of the same purpose, collective and frequency travel as if they were one."""
    found: dict[tuple[str, Collective, float], float] = {}
    for message in messages:
        if message.payload_bytes and message.times:
            key = (message.what, message.collective, message.times)
            found[key] = found.get(key, 0.0) + message.payload_bytes
    return [Message(what, collective, payload, times) for (what, collective, times), payload in found.items()]
