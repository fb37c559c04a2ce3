"""The training stream: every document exactly once, and a resumed stream equal to an uninterrupted one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.config.schema import DataConfig
from lowrank_train.data import Tokenizer, training_batches
from tests.data.corpora import config, document, streams, write_jsonl, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores

DOCUMENTS = 63  # in three shards
Batch = dict[str, Any]


def read_windows(iterators: list[Any], windows: int, window: int = 2) -> list[list[Batch]]:
    """For every rank its next micro-batches; stops early when all ranks are exhausted."""
    read: list[list[Batch]] = [[] for _ in iterators]
    for _ in range(windows):
        step = [list(itertools.islice(iterator, window)) for iterator in iterators]
        if all(batch["exhausted"] for batches in step for batch in batches):
            break
        for batches, new in zip(read, step, strict=True):
            batches.extend(new)
    return read


def documents(batches: list[list[Batch]]) -> list[str]:
    return [name for rank in batches for batch in rank for name in batch["documents"]]


def read_all(data: DataConfig, tokenizer: Tokenizer, ranks: int, interruptions: tuple[int, ...] = ()) -> list[str]:
    """All documents of one pass, stopped and resumed after each number of windows."""
    seen: list[str] = []
    position = None
    for windows in (*interruptions, 1000):
        batches = read_windows(streams(data, tokenizer, ranks, position=position), windows)
        seen += documents(batches)
        if batches[0]:
            position = [rank[-1]["position"] for rank in batches]
    return seen


@pytest.mark.parametrize(
    ("packing", "ranks", "workers", "shuffle"),
    [  # every two values of two of them
        ("pad", 1, 0, 0), ("concat", 1, 0, 10), ("pad", 2, 0, 10), ("concat", 2, 0, 0), ("concat", 4, 0, 0),
        ("pad", 4, 0, 10), ("concat", 1, 1, 10), ("pad", 2, 1, 0), ("pad", 4, 1, 10), ("pad", 1, 2, 0),
        ("concat", 2, 2, 10), ("concat", 4, 2, 0),
    ],
)  # fmt: skip
def test_every_document_exactly_once(
    shards: list[str], tokenizer: Tokenizer, packing: str, ranks: int, workers: int, shuffle: int
) -> None:
    data = config(shards, packing=packing, num_workers=workers, shuffle_documents=shuffle, repeat=False)
    seen = read_all(data, tokenizer, ranks, interruptions=(1, 2) if workers < 2 else ())
    assert Counter(seen) == Counter(read_all(config(shards, repeat=False), tokenizer, 1))
    assert len(seen) == DOCUMENTS


def test_eight_workers(shards: list[str], tokenizer: Tokenizer) -> None:
    """As many as the loader that GaLore's repository has by default, which reads an eighth of the corpus."""
    seen = read_all(config(shards, packing="pad", num_workers=8, repeat=False), tokenizer, 1)
    assert len(seen) == len(set(seen)) == DOCUMENTS


def test_every_epoch_holds_every_document_once(shards: list[str], tokenizer: Tokenizer) -> None:
    data = config(shards, packing="pad", shuffle_documents=10)
    batches = read_windows(streams(data, tokenizer, 1, batch_size=9, window=1), 2 * DOCUMENTS // 9, window=1)
    seen = documents(batches)
    first, second = seen[:DOCUMENTS], seen[DOCUMENTS:]
    assert len(set(first)) == len(set(second)) == DOCUMENTS
    assert first != second
    assert batches[0][-1]["position"]["place"]["documents"] == 2 * DOCUMENTS


@pytest.mark.parametrize("packing", ["pad", "concat"])
@pytest.mark.parametrize(("ranks", "workers", "shuffle"), [(1, 0, 0), (1, 3, 7), (2, 2, 0), (2, 0, 7)])
def test_resumed_stream_is_bit_identical(
    shards: list[str], tokenizer: Tokenizer, packing: str, ranks: int, workers: int, shuffle: int
) -> None:
    """Over more than two epochs, resumed at every third window."""
    data = config(shards, packing=packing, num_workers=workers, shuffle_documents=shuffle, mask_documents=True)
    whole = read_windows(streams(data, tokenizer, ranks), 24)
    assert max(place["epoch"] for place in places(whole[0][-1]["position"])) >= 1
    for windows in (1, 8, 17):
        position = [rank[2 * windows - 1]["position"] for rank in whole]
        resumed = read_windows(streams(data, tokenizer, ranks, position=position), 24 - windows)
        for expected, got in zip(whole, resumed, strict=True):
            for one, other in zip(expected[2 * windows :], got, strict=True):
                assert_equal(one, other)


def places(position: Any) -> list[dict[str, int]]:
    return [lane["place"] for lane in position["lanes"].values()] if "lanes" in position else [position["place"]]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]) and value.dtype == other[key].dtype, key
        else:
            assert value == other[key], key


@pytest.mark.parametrize("workers", [0, 3])
def test_padded_rows_do_not_depend_on_workers(shards: list[str], tokenizer: Tokenizer, workers: int) -> None:
    """Micro-batch k of rank r is the documents [(k R + r) b, (k R + r + 1) b) of the global order."""
    data = config(shards, packing="pad", num_workers=workers)
    read = read_windows(streams(data, tokenizer, 2, batch_size=4), 3)
    names = [f"shard-0.json.gz:{line}" for line in range(1, 24)] + [f"shard-1.json.gz:{line}" for line in range(1, 10)]
    for rank, batches in enumerate(read):
        for k, batch in enumerate(batches[:4]):
            first = (2 * k + rank) * 4
            assert batch["documents"] == names[first : first + 4]


@pytest.mark.parametrize("shuffle", [0, 7])
def test_padded_rows_resume_under_any_geometry(shards: list[str], tokenizer: Tokenizer, shuffle: int) -> None:
    """Ranks, workers and batch size change at every stop; every document comes once, in the same order."""
    seen: list[str] = []
    position = None
    for ranks, workers, batch_size in ((2, 0, 3), (1, 2, 5), (4, 0, 2), (1, 0, 7)):
        data = config(shards, packing="pad", num_workers=workers, shuffle_documents=shuffle, repeat=False)
        iterators = streams(data, tokenizer, ranks, position=position, batch_size=batch_size, window=1)
        batches = read_windows(iterators, 2 if batch_size < 7 else 1000, window=1)
        seen += [name for step in zip(*batches, strict=True) for batch in step for name in batch["documents"]]
        position = [rank[-1]["position"] for rank in batches]
    plain = config(shards, packing="pad", shuffle_documents=shuffle, repeat=False)
    assert seen == read_all(plain, tokenizer, 1)


def test_lanes_move_to_other_ranks_and_workers(shards: list[str], tokenizer: Tokenizer) -> None:
    """Four lanes of 2 ranks x 2 workers go on over 1 rank without workers, then 4 ranks."""
    seen: list[str] = []
    position = None
    for ranks, workers, windows in ((2, 2, 2), (1, 0, 2), (4, 1, 1000)):
        data = config(shards, num_workers=workers, repeat=False)
        batches = read_windows(streams(data, tokenizer, ranks, position=position), windows)
        seen += documents(batches)
        position = [rank[-1]["position"] for rank in batches]
    assert len(seen) == len(set(seen)) == DOCUMENTS


def test_whole_files_go_to_lanes_when_they_share_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = write_shards(tmp_path, (12, 7, 9, 4))
    batches = read_windows(streams(config(files, repeat=False), tokenizer, 2), 1000)
    of_rank = [{name.split(":")[0] for batch in rank for name in batch["documents"]} for rank in batches]
    assert of_rank == [{"shard-0.json.gz", "shard-2.json.gz"}, {"shard-1.json.gz", "shard-3.json.gz"}]
    assert len(set(documents(batches))) == len(documents(batches)) == 32


def test_no_token_is_lost_between_rows(shards: list[str], tokenizer: Tokenizer) -> None:
    """Rows packed end to end hold the documents' tokens in order, each document closed by the end mark."""
    batches = read_windows(streams(config(shards, repeat=False), tokenizer, 1), 1000)[0]
    got = [int(id_) for batch in batches for id_ in batch["labels"].flatten() if id_ != -100]
    expected = [id_ for ids in tokenizer.encode([document(n) for n in range(DOCUMENTS)]) for id_ in (*ids, 1)]
    assert got == expected
    assert sum(batch["num_tokens"] for batch in batches) == len(expected)


def test_padded_row_is_the_papers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One document: cut to seq_len - 1 tokens and the end mark, then pads that are no targets."""
    short, long = "Who's there?", "Nay, answer me: stand, and unfold yourself. " * 9
    file = write_jsonl(tmp_path / "two.jsonl", [short, long])
    data = config([str(file)], packing="pad", repeat=False)
    (batch,) = read_windows(streams(data, tokenizer, 1, batch_size=2, window=1), 1, window=1)[0]
    short_ids, long_ids = tokenizer.encode([short, long])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"][0].tolist() == [*short_ids, 1, *[0] * (31 - len(short_ids))]
    assert batch["labels"][0].tolist() == [*short_ids, 1, *[-100] * (31 - len(short_ids))]
    assert batch["input_ids"][1].tolist() == batch["labels"][1].tolist() == [*long_ids[:31], 1]
    assert batch["num_positions"] == 64
    assert batch["num_tokens"] == len(short_ids) + 1 + 32
    assert batch["window_targets"] == len(short_ids) + 31


def test_document_ids(shards: list[str], tokenizer: Tokenizer) -> None:
    data = config(shards, mask_documents=True, repeat=False)
    batches = read_windows(streams(data, tokenizer, 1), 1000)[0]
    for batch in batches:
        ids, names, labels = batch["input_ids"], batch["document_ids"], batch["labels"]
        assert names.dtype == torch.int32
        steps = names[:, 1:] - names[:, :-1]
        inside = names[:, 1:] >= 0
        assert ((steps == 0) | (steps == 1))[inside].all()
        starts = (steps == 1) & inside
        assert (labels[:, 1:][starts] == -100).all()
        assert (ids[:, :-1][starts] == tokenizer.eos_id).all()
        assert torch.equal(labels[:, 1:][(steps == 0) & inside], ids[:, 1:][(steps == 0) & inside])
        assert (labels[names == -1] == -100).all()
    assert batches[-1]["document_ids"].min() == -1


def test_window_targets_and_exhaustion(shards: list[str], tokenizer: Tokenizer) -> None:
    """Windows are whole, say how many targets they have, and ranks that are done go on with pads."""
    data = config(shards, packing="pad", repeat=False)
    read = read_windows(streams(data, tokenizer, 2, batch_size=5, window=3), 1000, window=3)
    assert len(read[0]) == len(read[1]) == 9  # 13 groups over 2 ranks: 7 micro-batches, in windows of 3
    for batches in read:
        for first in range(0, 9, 3):
            targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches[first : first + 3])
            assert {batch["window_targets"] for batch in batches[first : first + 3]} == {targets}
    assert [batch["exhausted"] for batch in read[1]] == [False] * 6 + [True] * 3
    assert read[1][-1]["num_tokens"] == 0 and (read[1][-1]["labels"] == -100).all()
    assert len(list(training_batches(data, tokenizer, batch_size=5, micro_batches=4, seed=0))) == 16


def test_the_global_generator_is_left_alone(shards: list[str], tokenizer: Tokenizer) -> None:
    before = torch.get_rng_state()
    read_windows(streams(config(shards, num_workers=1, shuffle_documents=5), tokenizer, 1), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_outlive_signals_to_the_group(shards: list[str], tokenizer: Tokenizer) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the workers too; the trainer still finishes its step and saves."""
    (iterator,) = streams(config(shards, num_workers=1), tokenizer, 1)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        assert worker.pid
        os.kill(worker.pid, number)
    assert len(list(itertools.islice(iterator, 50))) == 50
    iterator.close()
    worker.join(10)
    assert not worker.is_alive()


def test_resume_far_into_a_shard_takes_no_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Skipped lines are neither parsed nor tokenized: 200,000 documents are passed within a second or two."""
    import time

    file = write_jsonl(tmp_path / "big.json.gz", ["To be, or not to be, that is the question." * 8] * 200_000)
    data = config([str(file)], packing="pad")
    position = next(streams(data, tokenizer, 1)[0])["position"]
    position["place"] |= {"line": 199_000, "block": 199_000, "documents": 199_000}
    began = time.process_time()
    batch = next(streams(data, tokenizer, 1, position=position)[0])
    assert batch["documents"][0] == "big.json.gz:199002"
    assert time.process_time() - began < 5
