"""What a model must beat: the perplexity of single-token frequencies; and the fingerprint of a corpus."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np

from lowrank_train.config.schema import DataConfig
from lowrank_train.data.documents import open_source
from lowrank_train.data.files import expand, expand_braces, find_local, is_remote
from lowrank_train.data.packing import IGNORED, ended
from lowrank_train.data.tokenizer import Tokenizer
from lowrank_train.data.validation import validation_batches

TRAINING_TOKENS = 2_000_000  # enough for frequencies; more would only take longer
HASHED_BYTES = 16 * 2**20  # files up to this size are hashed whole


def unigram_perplexity(data: DataConfig, tokenizer: Tokenizer) -> float:
    """Perplexity of the validation targets under add-one smoothed token frequencies in 2M tokens of training text."""
    counts = np.ones(tokenizer.vocab_size, dtype=np.int64)
    source = open_source(data, "train", tokenizer)
    slots = (slot for file in range(len(source.files)) for slot in source.slots(file))
    while (read := list(itertools.islice(slots, 32))) and counts.sum() < TRAINING_TOKENS:
        for ids in source.encode(read):
            np.add.at(counts, ended(ids, tokenizer.eos_id), 1)
    log_probability = np.log(counts / counts.sum())
    total, targets = 0.0, 0
    for batch in validation_batches(data, tokenizer, batch_size=64):
        labels = batch["labels"][:, 1:].numpy()
        wanted = labels[labels != IGNORED]
        total -= float(log_probability[wanted].sum())
        targets += wanted.size
    return math.exp(total / max(1, targets))


def data_fingerprint(data: DataConfig) -> str:
    """sha256 over name and size of every training file, and the content of those up to 16 MiB; for remote files over
    their addresses and the pinned revision."""
    digest = hashlib.sha256(f"{data.source} {data.text_key} {data.revision}".encode())
    if data.source == "tokens":
        folders = [find_local(name) for name in data.train]
        files = [str(folder / "index.json") for folder in folders if folder]  # it has the checksum of every shard
    else:
        remote = [address for given in data.train if is_remote(given) for address in expand_braces(given)]
        local = [address for address in data.train if not is_remote(address)]
        files = remote + (expand(local, key="data.train", source=data.source) if local else [])
    for file in files:
        if is_remote(file):
            digest.update(f"\n{file}".encode())
            continue
        size_bytes = Path(file).stat().st_size
        digest.update(f"\n{Path(file).name} {size_bytes}".encode())
        if size_bytes <= HASHED_BYTES:
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()
