"""Ranks, workers and micro-batches that change at every stop: each document once an epoch, and no token lost."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from typing import Any

import pytest

from lowrank_train.config.schema import DataConfig, RunConfig
from lowrank_train.data import Tokenizer, stream
from lowrank_train.data.documents import open_source
from lowrank_train.data.packing import ended
from lowrank_train.data.prepare import prepare
from tests.data.corpora import config, document, streams, write_jsonl

SIZES = (23, 0, 9, 31, 1, 8)  # documents of the six files; 1, 2, 3 or 6 walks share them out
DOCUMENTS = sum(SIZES)
KINDS = ("jsonl", "jsonl.gz", "text", "tokens")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    """The same texts in every form; as plain text each in a file of its own."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = iter([document(number) for number in range(DOCUMENTS)])
    parts = [list(itertools.islice(texts, size)) for size in SIZES]
    found = {}
    for ending in ("jsonl", "jsonl.gz"):
        files = [str(write_jsonl(folder / f"{number}.{ending}", part)) for number, part in enumerate(parts)]
        found[ending] = config(files, repeat=False)
    for number in range(DOCUMENTS):
        (folder / f"{number:03}.txt").write_text(document(number))
    found["text"] = config([str(folder / "*.txt")], source="text", repeat=False)
    prepare(RunConfig(data=config(found["jsonl"].train, validation=[]), out=str(folder / "out")))
    found["tokens"] = config([str(folder / "out" / "train")], source="tokens", repeat=False)
    return found


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers' lanes are read in this process, in the order in which the loader would hand them over."""
    monkeypatch.setattr(stream, "DataLoader", lambda dataset, **_: dataset)


class Reader:
    """What a run that is stopped and goes on again and again has read."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.position: Any = None
        self.documents: list[str] = []
        self.tokens: Counter[int] = Counter()

    def read(self, ranks: int, workers: int, batch_size: int, window: int, windows: int) -> bool:
        """So many windows with this geometry; True when the corpus has ended."""
        data = DataConfig(**{**vars(self.data), "num_workers": workers})
        options = {"position": self.position, "batch_size": batch_size, "window": window}
        iterators = streams(data, self.tokenizer, ranks, **options)
        for _ in range(windows):
            step = [list(itertools.islice(iterator, window)) for iterator in iterators]
            if all(batch["exhausted"] for batches in step for batch in batches):
                return True
            for batch in itertools.chain(*zip(*step, strict=True)):
                self.documents += batch["documents"]
                self.tokens.update(batch["labels"][batch["labels"] != -100].tolist())
            self.position = json.loads(json.dumps([batches[-1]["position"] for batches in step]))
        return False


def tokens_of(data: DataConfig, tokenizer: Tokenizer) -> Counter[int]:
    source = open_source(data, "train", tokenizer)
    slots = [slot for file in range(len(source.files)) for slot in source.slots(file)]
    return Counter(id_ for ids in source.encode(slots) for id_ in ended(ids, tokenizer.eos_id))


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", ["pad", "concat"])
@pytest.mark.parametrize("draw", range(4))
def test_any_geometry_reads_every_document_once(
    corpora: dict[str, DataConfig], tokenizer: Tokenizer, kind: str, packing: str, draw: int
) -> None:
    """Random ranks, workers, micro-batches and stops. Packed rows hold every token of the corpus, padded ones some."""
    choose = random.Random(f"{kind} {packing} {draw}")
    shuffle = choose.choice([0, 7, 1000, *(["all", "all"] if kind == "tokens" else [])])
    data = DataConfig(**{**vars(corpora[kind]), "packing": packing, "shuffle_documents": shuffle})
    reader, geometries = Reader(data, tokenizer), []
    for windows in (*(choose.randint(0, 3) for _ in range(6)), 1000):
        geometries.append((choose.randint(1, 6), choose.randint(0, 3), choose.randint(1, 4), choose.randint(1, 3)))
        if reader.read(*geometries[-1], windows):
            break
    assert len(reader.documents) == len(set(reader.documents)) == DOCUMENTS, (shuffle, geometries)
    if packing == "concat":
        assert reader.tokens == tokens_of(data, tokenizer), (shuffle, geometries)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", range(2))
def test_epochs_of_packed_rows(corpora: dict[str, DataConfig], tokenizer: Tokenizer, kind: str, draw: int) -> None:
    """With repeat: once in each epoch that is over, and at most once in each that has begun, though lanes drift."""
    choose = random.Random(f"{kind} {draw}")
    data = DataConfig(**{**vars(corpora[kind]), "repeat": True, "shuffle_documents": choose.choice([0, 7])})
    reader, begun, ended_epochs = Reader(data, tokenizer), 0, 0
    while ended_epochs < 2:
        reader.read(choose.randint(1, 5), choose.randint(0, 2), choose.randint(1, 4), 1, choose.randint(1, 4))
        lanes = [place for position in reader.position for place in position["lanes"].values()]
        epochs = [place["place"]["epoch"] for place in lanes]
        begun, ended_epochs = max(begun, max(epochs) + 1), min(epochs)
    counts = Counter(reader.documents)
    assert len(counts) == DOCUMENTS
    assert all(2 <= count <= begun for count in counts.values()), counts


@pytest.mark.usefixtures("no_processes")
def test_an_update_stays_the_same_where_lanes_share_out(corpora: dict[str, DataConfig], tokenizer: Tokenizer) -> None:
    """Four lanes on 4, then 2, then 1 ranks with as many rows an update: the documents of each update are the same."""
    updates = []
    for halved in (False, True):
        reader, seen = Reader(corpora["jsonl"], tokenizer), []
        for ranks in (4, 2 if halved else 4, 1 if halved else 4):
            before = len(reader.documents)
            reader.read(ranks, 0, 2, 4 // ranks, 2)
            seen.append(sorted(reader.documents[before:]))
        updates.append(seen)
    assert updates[0] == updates[1]
    assert all(updates[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
def test_real_workers(corpora: dict[str, DataConfig], tokenizer: Tokenizer) -> None:
    """Worker processes map token shards for themselves, and go on from any other geometry."""
    data = DataConfig(**{**vars(corpora["tokens"]), "shuffle_documents": "all"})
    reader = Reader(data, tokenizer)
    for ranks, workers, windows in ((2, 2, 3), (3, 1, 2), (1, 3, 1000)):
        reader.read(ranks, workers, 1, 1, windows)
    assert len(reader.documents) == len(set(reader.documents)) == DOCUMENTS
    assert reader.tokens == tokens_of(data, tokenizer)
