"""How documents are dealt to lanes, and dealt anew when a run goes on with another number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_train.config.schema import DataConfig
from lowrank_train.data.documents import Source
from lowrank_train.data.order import Place


@dataclass(frozen=True)
class Taken:
    """What an earlier set of lanes took of one walk: document n is done if n < behind[n mod len(behind)]; of some that
    are not, the first tokens are."""

    behind: list[int]
    begun: dict[int, int] = field(default_factory=dict)  # document -> its tokens that are done

    def as_json(self) -> dict[str, Any]:
        """JSON has no integers for keys."""
        return {"behind": self.behind, "begun": sorted(self.begun.items())}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Taken:
        """The inverse of `as_json`."""
        return cls(list(saved["behind"]), dict(saved["begun"]))

    def has(self, document: int) -> bool:
        """Whether all of the document is done."""
        return document < self.behind[document % len(self.behind)]


@dataclass(frozen=True)
class Dealing:
    """`lanes` consumers over all ranks, of which number l reads walk l mod walks through the corpus.

    One walk goes through all files; several go each through files of its own, so that no lane has to read every file.
    Of its walk a lane takes the documents n with n mod (lanes / walks) = l div walks, but for what earlier lanes took.
    """

    lanes: int
    walks: int = 1
    earlier: tuple[tuple[Taken, ...], ...] = ((),)  # of each walk, oldest first

    def files(self, lane: int, count: int) -> list[int]:
        """The files, of `count`, that a lane's walk goes through."""
        return list(range(lane % self.walks, count, self.walks))

    def takes(self, lane: int, document: int) -> bool:
        """Whether document number `document` of the lane's walk is the lane's."""
        if document % (self.lanes // self.walks) != lane // self.walks:
            return False
        return not any(taken.has(document) for taken in self.earlier[lane % self.walks])

    def begun(self, lane: int) -> dict[int, int]:
        """Documents of which earlier lanes took the first tokens, and how many: the last word counts."""
        return {
            document: tokens for taken in self.earlier[lane % self.walks] for document, tokens in taken.begun.items()
        }

    def as_json(self) -> dict[str, Any]:
        """The entries of a position."""
        return {
            "count": self.lanes,
            "walks": self.walks,
            "earlier": [[taken.as_json() for taken in walk] for walk in self.earlier],
        }

    @classmethod
    def from_json(cls, position: Mapping[str, Any]) -> Dealing:
        """The inverse of `as_json`."""
        earlier = tuple(tuple(Taken.from_json(taken) for taken in walk) for walk in position["earlier"])
        return cls(position["count"], position["walks"], earlier)


Starts = dict[int, tuple[Place, int]]
"""Of each lane the document where it stands, and how many of its tokens are done."""


def first_dealing(data: DataConfig, source: Source, lanes: int) -> Dealing:
    """That of a run that begins.

    Whole files are dealt when documents are packed end to end (padded rows are dealt in the global order, which any
    number of ranks can take up), every lane gets equally many, and no shuffle goes over all of them.
    """
    by_file = data.packing == "concat" and data.shuffle_documents != "all" and len(source.files) % lanes == 0
    walks = lanes if by_file else 1
    return Dealing(lanes, walks, ((),) * walks)


def dealt_again(positions: Sequence[Mapping[str, Any]], ranks: int, workers: int) -> tuple[Dealing, Starts]:
    """The dealing with which `ranks` ranks go on from the positions of all ranks before, and where its lanes stand.

    The lanes stay where they can be shared out equally: then an update of the same rows has the same documents. Else
    there are new ones, ranks x workers for a single walk, and the least common multiple of walks and ranks for several;
    they begin where the last of the old ones stood, skip what was taken, and finish the documents that were begun.
    """
    old = Dealing.from_json(positions[0])
    saved = {int(lane): place for position in positions for lane, place in position["lanes"].items()}
    starts = {lane: (Place(**entry["place"]), entry["token"]) for lane, entry in saved.items()}
    if old.lanes % ranks == 0:
        return old, starts
    assert set(starts) == set(range(old.lanes)), "the positions of all ranks are needed"
    lanes = ranks * max(1, workers) if old.walks == 1 else math.lcm(old.walks, ranks)
    earlier, firsts = [], []
    for walk in range(old.walks):
        stand = [starts[lane] for lane in range(walk, old.lanes, old.walks)]
        taken = Taken(
            [place.documents for place, _ in stand],
            {place.documents: tokens for place, tokens in stand if tokens},
        )
        # A lane that stands at a document has done all of its share before it: what lies further back says no more.
        kept = [before for before in old.earlier[walk] if max(before.behind) >= min(taken.behind)]
        earlier.append((*kept, taken))
        firsts.append(min((place for place, _ in stand), key=lambda place: place.documents))
    return Dealing(lanes, old.walks, tuple(earlier)), {lane: (firsts[lane % old.walks], 0) for lane in range(lanes)}
