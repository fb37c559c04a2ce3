"""Small corpora that the tests of lowrank_train.data write for themselves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from lowrank_train.config.schema import DataConfig
from lowrank_train.data import Tokenizer, training_batches

TOKENIZER = "data/shakespeare/tokenizer.model"


def document(number: int) -> str:
    """A text that names itself and is between 3 and about 80 tokens long."""
    return f"Document {number}. " + "To be, or not to be. " * (number * 7 % 9)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """C4's own form, gzip where the name says so."""
    rest = {"timestamp": "2019-04-25T12:57:54Z", "url": "u"}
    content = "".join(json.dumps({"text": text, **rest}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def write_shards(folder: Path, sizes: tuple[int, ...] = (23, 9, 31)) -> list[str]:
    """Shards of `sizes` documents, numbered through."""
    files, first = [], 0
    for number, size in enumerate(sizes):
        texts = [document(index) for index in range(first, first + size)]
        files.append(str(write_jsonl(folder / f"shard-{number}.json.gz", texts)))
        first += size
    return files


def config(train: list[str], **changes: Any) -> DataConfig:
    """A configuration with rows short enough that documents cross their ends."""
    base = DataConfig(train=train, validation=train, tokenizer=TOKENIZER, seq_len=32, log_documents=True)
    return DataConfig(**{**vars(base), **changes})


def streams(
    data: DataConfig, tokenizer: Tokenizer, ranks: int, *, position: Any = None, batch_size: int = 3, window: int = 2
) -> list[Any]:
    """One fresh iterator for every rank; the position goes through JSON, as it does in a checkpoint."""
    position = json.loads(json.dumps(position))
    return [
        iter(
            training_batches(
                data,
                tokenizer,
                batch_size=batch_size,
                micro_batches=window,
                rank=rank,
                world_size=ranks,
                seed=5,
                position=position,
            )
        )
        for rank in range(ranks)
    ]
