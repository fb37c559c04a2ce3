"""The shuffle of a whole corpus: a permutation that changes with seed and epoch, and goes on from any place."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lowrank_train.config import UserError, compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer
from lowrank_train.data.documents import open_source
from lowrank_train.data.order import Place
from lowrank_train.data.prepare import prepare
from lowrank_train.data.shuffle import EpochPermutation, ShuffledOrder
from lowrank_train.data.tokens import TokenShards
from tests.data.corpora import config, write_shards


@pytest.mark.parametrize("count", [*range(1, 70), 4095, 4096, 4097, 99_991])
def test_a_permutation(count: int) -> None:
    """Of squares, of the numbers beside them, of primes; each place asked for alone gives the same."""
    whole = EpochPermutation(count, "5/0")(np.arange(count))
    assert np.array_equal(np.sort(whole), np.arange(count))
    places = np.arange(count)[:: max(1, count // 7)]
    assert [EpochPermutation(count, "5/0")(places[at : at + 1])[0] for at in range(len(places))] == whole[
        places
    ].tolist()


def test_every_document_is_equally_likely_at_every_place() -> None:
    """Over 5,000 epochs of 10 documents: chi-squared of 81 degrees of freedom is below 126, its 99.9th percentile."""
    counts = np.zeros((10, 10))
    for epoch in range(5000):
        counts[np.arange(10), EpochPermutation(10, f"7/{epoch}")(np.arange(10))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 126


def test_neighbours_are_parted() -> None:
    """Of 100,000 documents: places and neighbours are uncorrelated (5 standard errors of 1 / sqrt(n)), and about 1 of
    the n - 1 pairs is still in a row: 0 to 8 with a probability of 0.999998."""
    count = 100_000
    found = EpochPermutation(count, "1/1")(np.arange(count))
    assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 5 / count**0.5
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / count**0.5
    assert (np.diff(found) == 1).sum() <= 8


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenShards:
    folder = tmp_path_factory.mktemp("tokens")
    data = config(write_shards(folder, (23, 0, 9, 31)), validation=[])
    prepare(RunConfig(data=data, out=str(folder / "out")))
    source = open_source(config([str(folder / "out" / "train")], source="tokens"), "train", tokenizer)
    assert isinstance(source, TokenShards)
    return source


def test_the_order_of_a_corpus(tokens: TokenShards) -> None:
    """Epochs are whole and differ, seeds differ, and from any place the walk goes on as it would have."""
    walked = list(itertools.islice(ShuffledOrder(tokens, repeat=True, seed=5).walk(Place(), lambda _: True), 130))
    names = [tokens.document_id(slot) for _, slot in walked]
    assert len(set(names[:63])) == len(set(names[63:126])) == 63
    assert names[:63] != names[63:126]
    assert Counter(name.split(":")[0] for name in names[:63]) == {"00000": 23, "00002": 9, "00003": 31}
    other = ShuffledOrder(tokens, repeat=False, seed=6).walk(Place(), lambda _: True)
    assert [tokens.document_id(slot) for _, slot in other] != names[:63]
    for at in (0, 17, 62, 63, 100):
        resumed = ShuffledOrder(tokens, repeat=True, seed=5).walk(walked[at][0].after(), lambda _: True)
        assert [tokens.document_id(slot) for _, slot in itertools.islice(resumed, 129 - at)] == names[at + 1 :]
    by_file = {tokens.document_id(slot): slot.payload.tolist() for file in range(4) for slot in tokens.slots(file)}
    assert {tokens.document_id(slot): slot.payload.tolist() for _, slot in walked} == by_file


def test_a_document_is_its_own_text(tokens: TokenShards, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = open_source(config(write_shards(tmp_path, (23, 0, 9, 31))), "train", tokenizer)
    documents = text.encode([slot for file in range(4) for slot in text.slots(file)])
    assert [tokens.encode([tokens.slot_of(number)])[0] for number in range(63)] == documents


def test_only_token_shards_are_shuffled_whole() -> None:
    with pytest.raises(UserError, match=r"data.shuffle_documents=all: needs .* data.source=jsonl .* data=tokens"):
        compose(["recipe=null", "data.shuffle_documents=all"])
    assert compose(["recipe=null", "data=tokens", "data.train=[x]"]).data.shuffle_documents == "all"
