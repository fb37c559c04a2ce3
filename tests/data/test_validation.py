"""Validation rows and unigram perplexity: the same whatever the batch size and the number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.data import Tokenizer, data_fingerprint, load_tokenizer, unigram_perplexity, validation_batches
from tests.data.corpora import TOKENIZER, config, document, write_jsonl, write_shards


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"))


def rows(data: Any, tokenizer: Tokenizer, *, batch_size: int, ranks: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every row of all ranks, in the order of the rows."""
    of_rank = []
    for rank in range(ranks):
        batches = validation_batches(data, tokenizer, batch_size=batch_size, rank=rank, world_size=ranks)
        first = list(batches)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, batches, strict=True))
        assert all(len(batch["input_ids"]) == batch_size for batch in first[:-1])
        of_rank.append(
            [
                pair
                for batch in first
                for pair in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
            ]
        )
    longest = max(map(len, of_rank))
    return [of_rank[rank][row] for row in range(longest) for rank in range(ranks) if row < len(of_rank[rank])]


@pytest.mark.parametrize("packing", ["pad", "concat"])
@pytest.mark.parametrize("limit", [None, 400])
def test_invariant_to_batch_size_and_ranks(
    shards: list[str], tokenizer: Tokenizer, packing: str, limit: int | None
) -> None:
    data = config(shards, packing=packing, validation_tokens=limit, shuffle_documents=9, num_workers=2)
    expected = rows(data, tokenizer, batch_size=4, ranks=1)
    for batch_size, ranks in ((1, 1), (7, 1), (4, 2), (3, 4)):
        assert rows(data, tokenizer, batch_size=batch_size, ranks=ranks) == expected
    targets = sum(label != -100 for _, labels in expected for label in labels[1:])
    if limit is not None:
        last = sum(label != -100 for label in expected[-1][1][1:])
        assert targets - last < limit <= targets
    else:
        tokens = tokenizer.encode([document(number) for number in range(63)])
        if packing == "pad":
            assert len(expected) == 63
            assert targets == sum(min(len(ids), 31) for ids in tokens)
        else:
            assert len(expected) == math.ceil(sum(len(ids) + 1 for ids in tokens) / 32)


def test_document_ids(shards: list[str], tokenizer: Tokenizer) -> None:
    """The first token of a document is no target where attention cannot see what came before."""
    data = config(shards, mask_documents=True)
    plain = list(validation_batches(config(shards), tokenizer, batch_size=8))
    masked = list(validation_batches(data, tokenizer, batch_size=8))
    for one, other in zip(plain, masked, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        names = other["document_ids"]
        starts = torch.ones_like(names, dtype=torch.bool)
        starts[:, 1:] = names[:, 1:] != names[:, :-1]
        assert torch.equal(other["labels"], one["labels"].masked_fill(starts, -100))


def test_unigram_perplexity(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ["To be, or not to be."] * 5)
    valid = write_jsonl(tmp_path / "valid.jsonl", ["To be or to see."])
    data = config([str(train)], validation=[str(valid)])
    counts = Counter(id_ for ids in tokenizer.encode(["To be, or not to be."] * 5) for id_ in (*ids, 1))
    total = sum(counts.values()) + 2048
    (ids,) = tokenizer.encode(["To be or to see."])
    targets = [*ids[1:], 1]
    expected = math.exp(-sum(math.log((counts[id_] + 1) / total) for id_ in targets) / len(targets))
    assert unigram_perplexity(data, tokenizer) == pytest.approx(expected, rel=1e-9)


def test_data_fingerprint(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    data = config([str(file)])
    first = data_fingerprint(data)
    assert first == data_fingerprint(config([str(tmp_path / "*.jsonl")]))
    write_jsonl(file, ["one", "six"])
    assert data_fingerprint(data) != first
    remote = config(["hf://datasets/allenai/c4/en/c4-train.{00000..00003}-of-01024.json.gz"], revision="a")
    assert data_fingerprint(remote) != data_fingerprint(config(remote.train, revision="b"))
