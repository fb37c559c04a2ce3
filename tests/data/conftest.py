"""A tokenizer and a corpus of three shards, for the tests of the training stream."""

from __future__ import annotations

import pytest

from lowrank_train.data import Tokenizer, load_tokenizer
from tests.data.corpora import TOKENIZER, write_shards


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_shards(tmp_path_factory.mktemp("shards"))
