"""The training stream: micro-batches for one rank, tokenized in worker processes, that stop and go on exactly.

Documents have one global order (`order.py`). They are dealt to lanes: rank r of R with W workers has the lanes
r, r + R, ..., r + (W - 1) R, and takes a micro-batch from each in turn. Padded rows are dealt in groups of a batch, so
that micro-batch k of rank r is the documents [(k R + r) b, (k R + r + 1) b) whatever W is; the position is one place in
the global order, from which any number of ranks and workers can go on. Rows packed end to end belong to their lane; its
place and the token it has reached are the position. The lanes stay, whatever the workers, on any number of ranks that
divides theirs; on another number the documents that are left are dealt to new lanes (`dealing.py`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.dealing import Starts, dealt_again, first_dealing
from lowrank_train.data.documents import Fault, IndexedSource
from lowrank_train.data.lanes import Deal, concatenated_batches, padded_batches
from lowrank_train.data.order import Place
from lowrank_train.data.ranks import open_for_ranks
from lowrank_train.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Position = dict[str, Any]
PREFETCHED_BATCHES = 4  # micro-batches each worker may be ahead
GRACE_SEC = 30  # between SIGTERM and the end of a worker: time for the trainer to finish its step and save


def training_batches(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    micro_batches: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    position: Position | list[Position] | None = None,
) -> TrainingBatches:
    """The micro-batches of one rank, from the start or from `position` on.

    Args:
        data: which documents, and how they become rows.
        tokenizer: gives the ids.
        batch_size: rows of a micro-batch on this rank.
        micro_batches: micro-batches of one accumulation window, over which `window_targets` counts.
        rank: this process among `world_size`.
        world_size: processes that share the corpus.
        seed: of the shuffle; unused without `data.shuffle_documents`.
        position: `batch["position"]` of the last micro-batch of a window, of every rank where there are several.

    Raises:
        UserError: the corpus names nothing or nothing readable, or `position` belongs to another corpus or geometry.
    """
    source = open_for_ranks(data, "train", tokenizer, world_size)
    positions = [position] if isinstance(position, dict) else list(position or [])
    names = [*source.names, *([f"{source.num_documents} documents"] if isinstance(source, IndexedSource) else [])]
    stamp = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    identity = {"packing": data.packing, "files": stamp, "shuffle_documents": data.shuffle_documents}
    if data.shuffle_documents:
        identity["seed"] = seed
    for saved in positions:
        _check_identity(saved, identity)
    dealing = first_dealing(data, source, world_size * max(1, data.num_workers))
    starts: Starts = {}
    if positions and data.packing == "concat":
        dealing, starts = dealt_again(positions, world_size, data.num_workers)
    elif positions:
        # Ranks stop after the same micro-batch; the one dealt last has gone farthest in the common order.
        place = max((Place(**saved["place"]) for saved in positions), key=lambda place: place.documents)
        starts = dict.fromkeys(range(dealing.lanes), (place, 0))
    deal = Deal(data, source, tokenizer, batch_size, seed, dealing)
    return TrainingBatches(deal, rank, world_size, micro_batches, identity, starts, _turn(positions, rank, world_size))


def _turn(positions: list[Position], rank: int, world_size: int) -> int | None:
    """The lane whose turn it is on this rank, where the same rank of as many was saved."""
    return positions[rank].get("next") if len(positions) == world_size else None


def _check_identity(saved: Position, identity: dict[str, Any]) -> None:
    names = {"packing": "data.packing", "shuffle_documents": "data.shuffle_documents", "seed": "seed"}
    for key, value in identity.items():
        if saved.get(key) == value:
            continue
        if key == "files":
            raise UserError(
                "data.train: the files are not those the checkpoint was reading, so its place in them means nothing; "
                "give the same files, or start anew with resume=false"
            )
        raise UserError(
            f"{names[key]}={value}: the checkpoint has {saved.get(key)}, and its place in the corpus is of no use with "
            f"another; set {names[key]}={saved.get(key)}, or start anew with resume=false"
        )


class _LaneBatches(IterableDataset[dict[str, Any]]):
    """Micro-batches of several lanes in turn; an exhausted lane goes on to yield `None` in its turn."""

    def __init__(self, deal: Deal, lanes: list[int], starts: dict[int, tuple[Place, int]], processes: int) -> None:
        self._deal, self._lanes, self._starts, self._processes = deal, lanes, starts, processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        lanes = self._lanes[worker.id :: self._processes] if worker else self._lanes
        streams = {lane: self._stream(lane) for lane in lanes}
        try:
            while True:
                for lane, stream in streams.items():
                    yield {"lane": lane, "batch": next(stream, None)}
        except UserError as error:  # through a worker's pipe it would arrive with a traceback in its text
            yield {"faults": error.faults}

    def _stream(self, lane: int) -> Iterator[dict[str, Any]]:
        place, token = self._starts[lane]
        if self._deal.data.packing == "pad":
            return padded_batches(self._deal, place, lane)
        return concatenated_batches(self._deal, place, token, lane)


def _init_worker(_: int) -> None:
    """A signal to the whole process group must not kill the workers before the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SEC))


class TrainingBatches:
    """Iterable over micro-batches; see `training_batches`.

    With `repeat` it never ends. Without, a rank that has no document left yields `exhausted` micro-batches of pads, so
    that every rank does the same number of updates: a single rank ends after the window with its last document, several
    go on until the trainer sees that all are exhausted.
    """

    def __init__(
        self,
        deal: Deal,
        rank: int,
        world_size: int,
        micro_batches: int,
        identity: dict[str, Any],
        starts: Starts,
        turn: int | None,
    ) -> None:
        """`starts`: where lanes stand, the beginning for those that are not named; `turn`: the first one's number."""
        self._deal, self._world_size, self._micro_batches = deal, world_size, micro_batches
        self._identity = identity
        self.skipped: Counter[str] = Counter()  # documents this rank could not read, by kind
        self._damaged: set[Fault] = set()
        lanes = list(range(rank, deal.dealing.lanes, world_size))
        self._starts = {lane: starts.get(lane, (Place(), 0)) for lane in lanes}
        first = lanes.index(turn) if turn in lanes else 0
        self._lanes = lanes[first:] + lanes[:first]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields micro-batches as `training_batches` describes them."""
        window: list[dict[str, Any]] = []
        batches = self._batches()
        while True:
            window = [next(batches) for _ in range(self._micro_batches)]
            if self._world_size == 1 and all(batch["exhausted"] for batch in window):
                return
            window_targets = sum(batch.pop("num_targets") for batch in window)
            for batch in window:
                yield batch | {"window_targets": window_targets}

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Micro-batches in order with their positions, without end."""
        places = {lane: {"place": place.as_dict(), "token": token} for lane, (place, token) in self._starts.items()}
        alive = set(self._lanes)
        position = self._position(places, self._lanes[0])
        for lane, batch in self._dealt():
            if batch is None:
                alive.discard(lane)
                if not alive:
                    break
                continue
            self._count(batch.pop("faults"))
            places[lane] = {"place": batch.pop("place"), "token": batch.pop("token", 0)}
            turn = self._lanes[(self._lanes.index(lane) + 1) % len(self._lanes)]
            position = self._position(places, turn, lane)
            yield batch | {"position": position}
        while True:
            batch = self._deal.exhausted()
            del batch["faults"]
            yield batch | {"position": position}

    def _position(self, places: dict[int, Any], turn: int, latest: int | None = None) -> Position:
        if self._deal.data.packing == "pad":
            place = places[turn if latest is None else latest]["place"]
            return self._identity | {"place": place}
        lanes = {str(lane): place for lane, place in sorted(places.items())}
        return self._identity | self._deal.dealing.as_json() | {"next": turn, "lanes": lanes}

    def _dealt(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """(lane, micro-batch) in the order of lanes."""
        wanted = self._deal.data.num_workers
        # Every process serves equally many lanes, so that the processes' round robin is the lanes' too.
        processes = max((n for n in range(1, wanted + 1) if len(self._lanes) % n == 0), default=0)
        dataset = _LaneBatches(self._deal, self._lanes, self._starts, processes)
        items: Any = dataset
        if processes:
            # Warned about, and switched off, by the library when it finds itself forked.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            items = DataLoader(
                dataset,
                batch_size=None,
                num_workers=processes,
                prefetch_factor=PREFETCHED_BATCHES,
                worker_init_fn=_init_worker,
                generator=torch.Generator(),  # else it draws its seed from the global generator
            )
        for item in items:
            if "lane" not in item:
                raise UserError(item["faults"])
            yield item["lane"], item["batch"]

    def _count(self, faults: list[Fault]) -> None:
        """Counts what was skipped and warns at the 1st, 10th, 100th, ... of a kind."""
        for fault in faults:
            if fault.kind.startswith("damaged"):
                if fault in self._damaged:
                    continue  # every lane and every epoch comes across it
                self._damaged.add(fault)
            self.skipped[fault.kind] += 1
            count = self.skipped[fault.kind]
            if str(count).strip("0") == "1":
                log.warning("skipped: %s at %s (%d so far)", fault.kind, fault.where, count)
