"""Rows filled with whole examples: best fit, longest first."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence


def fill_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices of the examples of each row, every index once; no row is longer than `seq_len` and no example is cut.

    Each example, from the longest to the shortest, goes into the row that it leaves least room in, or else into a new
    one: best-fit decreasing, at most 11/9 of the fewest rows and a few more (Johnson et al., SIAM J. Comput. 3, 1974).
    It depends on the lengths alone, so that every epoch and every rank has the same rows.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # tokens of room left -> rows that have just as much
    rooms: list[int] = []  # the keys of `with_room` that have rows, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        assert 0 < length <= seq_len, "examples are cut before they are packed"
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(index)
        left = room - length
        if left:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(row)
    return rows
