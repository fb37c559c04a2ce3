"""From two shallow models to a deep one: every moment of a run is linear in the number of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lowrank_train.memory.fake_run import FakeRun
from lowrank_train.memory.watch import Extent, Segment, Watched

SHALLOW, DEEPER = 3, 4
"""The depths to extrapolate from: the least at which there is a layer that is neither the first nor the last, and one
that is the second without being the last but one."""

Line = tuple[float, float]  # bytes at SHALLOW and at DEEPER layers


class NotAlike(Exception):
    """The two models did not go through the same moments, so that nothing follows from them for a third."""


def extrapolated(shallow: FakeRun, deeper: FakeRun, layers: int) -> Watched:
    """What a model with so many layers would have shown.

    In a segment of layer i of L, let the bytes alive be a + b L + c i: each layer adds its weights, its state and its
    activations to all that comes after it, and takes away what it frees. The first layer, the last and those between
    them may differ in a, b and c. So each of these is linear in L: the first layer, the second, the last but one, the
    last, and whatever is outside the layers; and between the second and the last but one, the highest is one of the
    two. NotAlike where the segments of the two models do not correspond.
    """
    assert (shallow.layers, deeper.layers) == (SHALLOW, DEEPER)
    low, high = (_by_place(run.watched.segments, run.layers) for run in (shallow, deeper))
    if low.keys() != high.keys() or shallow.watched.moments.keys() != deeper.watched.moments.keys():
        raise NotAlike
    result = Watched()
    for segment, extent in low.items():
        start = _at(layers, (extent.start, high[segment].start))
        result.segments[segment] = Extent(start, _at(layers, (extent.peak, high[segment].peak)))
    for moment, count in shallow.watched.moments.items():
        result.moments[moment] = _at(layers, (count, deeper.watched.moments[moment]))
    return result


def _at(layers: int, line: Line) -> int:
    return round(line[0] + (line[1] - line[0]) * (layers - SHALLOW) / (DEEPER - SHALLOW))


def _by_place(segments: Mapping[Segment, Extent], layers: int) -> dict[Segment, Extent]:
    """The segments that are linear in the depth, named by their layer's place instead of its number."""
    found: dict[Segment, Extent] = {}
    places = {"first": 0, "second": 1, "last but one": layers - 2, "last": layers - 1}
    for segment, extent in segments.items():
        parts = re.fullmatch(r"(.*?\.)(\d+)(\..*)", segment.tensor)
        if parts is None:
            found[segment] = extent
            continue
        for place, number in places.items():
            if int(parts[2]) == number:
                found[segment._replace(tensor=f"{parts[1]}{place}{parts[3]}")] = extent
    return found
