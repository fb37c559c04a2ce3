"""Token shards: the same batches as from text, made in pieces, checked, and refused with another tokenizer."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lowrank_train.config.errors import EXIT_DISK_FULL, RunStopped, UserError
from lowrank_train.config.schema import DataConfig, RunConfig
from lowrank_train.data import Tokenizer, load_tokenizer, training_batches, unigram_perplexity
from lowrank_train.data.prepare import prepare
from tests.data.corpora import TOKENIZER, config, document, write_jsonl, write_shards


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


def tokens_config(data: DataConfig, out: Path) -> DataConfig:
    folders = {"train": [str(out / "train")], "validation": [str(out / "validation")]}
    return DataConfig(**{**vars(data), "source": "tokens", **folders})


@pytest.mark.parametrize("packing", ["pad", "concat"])
def test_the_same_batches_as_from_text(
    tmp_path: Path, tokenizer: Tokenizer, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config(
        write_shards(tmp_path), packing=packing, shuffle_documents=8, mask_documents=True, log_documents=False
    )
    assert prepare(RunConfig(data=data, out=str(tmp_path / "out"))) == 0
    said = capsys.readouterr().out
    assert "train: shard-2.json.gz (3 of 3 files), 63 documents" in said
    assert re.search(r"data=tokens data.train=\[.*/out/train\] data.validation=\[.*/out/validation\]", said)
    prepared = tokens_config(data, tmp_path / "out")
    options = {"batch_size": 5, "micro_batches": 2, "seed": 3}
    from_text = list(itertools.islice(training_batches(data, tokenizer, **options), 40))
    from_shards = list(itertools.islice(training_batches(prepared, tokenizer, **options), 40))
    for one, other in zip(from_text, from_shards, strict=True):
        for key in ("input_ids", "labels", "document_ids"):
            assert torch.equal(one[key], other[key])
    resumed = training_batches(prepared, tokenizer, position=from_shards[19]["position"], **options)
    for one, other in zip(from_shards[20:], resumed, strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert unigram_perplexity(data, tokenizer) == unigram_perplexity(prepared, tokenizer)


def test_skipped_documents_and_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = write_shards(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "Good."}\nrubbish\n{"text": ""}\n')
    data = config([*files, str(tmp_path / "bad.jsonl")], num_workers=2, repeat=False, packing="pad")
    prepare(RunConfig(data=data, out=str(tmp_path / "out")))
    prepared = tokens_config(data, tmp_path / "out")
    seen = [
        name
        for batch in training_batches(prepared, tokenizer, batch_size=4, micro_batches=1, seed=0)
        for name in batch["documents"]
    ]
    assert len(seen) == len(set(seen)) == 64
    assert seen[-1] == "00003:1"


def test_only_what_is_missing_or_damaged_is_made(tmp_path: Path) -> None:
    data = config(write_shards(tmp_path))
    run = RunConfig(data=data, out=str(tmp_path / "out"))
    prepare(run)
    folder = tmp_path / "out" / "train"
    original = {file.name: file.read_bytes() for file in folder.iterdir()}
    old = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "00001.bin").write_bytes(b"\0" * len(original["00001.bin"]))  # the size is right, the checksum is not
    (folder / "00002.json").unlink()  # stopped before it was finished
    (folder / "index.json").unlink()
    prepare(run)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == original
    assert (folder / "00000.bin").stat().st_mtime_ns == old["00000.bin"]
    assert (folder / "00002.bin").stat().st_mtime_ns != old["00002.bin"]


def test_a_killed_preparation_goes_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = [
        str(write_jsonl(tmp_path / f"{shard}.jsonl", [document(n) * 30 for n in range(700)])) for shard in range(6)
    ]
    code = (
        "import sys\n"
        "from lowrank_train.config.schema import DataConfig, RunConfig\n"
        "from lowrank_train.data.prepare import prepare\n"
        f"data = DataConfig(train={files!r}, tokenizer={TOKENIZER!r})\n"
        f"sys.exit(prepare(RunConfig(data=data, out={str(tmp_path / 'out')!r})))\n"
    )
    folder = tmp_path / "out" / "train"
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "00001.json").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "index.json").exists()
    kept = (folder / "00000.bin").stat().st_mtime_ns
    data = config(files, source="jsonl")
    with pytest.raises(UserError, match="preparation was not finished"):
        training_batches(tokens_config(data, tmp_path / "out"), tokenizer, batch_size=1, micro_batches=1, seed=0)
    prepare(RunConfig(data=config(files, validation=[]), out=str(tmp_path / "out")))
    assert (folder / "00000.bin").stat().st_mtime_ns == kept
    assert not list(folder.glob("*.partial"))
    shards = DataConfig(source="tokens", train=[str(folder)], tokenizer=TOKENIZER, packing="pad", repeat=False)
    batches = training_batches(shards, tokenizer, batch_size=100, micro_batches=1, seed=0)
    assert sum(int((batch["input_ids"][:, 0] != 0).sum()) for batch in batches) == 4200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_full_disk(tmp_path: Path) -> None:
    """Stops with its own exit code; what was finished stays, and the same command goes on from there."""
    run = RunConfig(data=config(write_shards(tmp_path), validation=[]), out=str(tmp_path / "out"))
    folder = tmp_path / "out" / "train"
    folder.mkdir(parents=True)
    (folder / "00001.bin.partial").symlink_to("/dev/full")
    with pytest.raises(RunStopped, match="is full") as caught:
        prepare(run)
    assert caught.value.exit_code == EXIT_DISK_FULL
    assert (folder / "00000.json").exists() and not (folder / "index.json").exists()
    (folder / "00001.bin.partial").unlink()
    assert prepare(run) == 0


def test_refusals(tmp_path: Path, tokenizer: Tokenizer, real_data: Path) -> None:
    data = config(write_shards(tmp_path))
    for run, message in (
        (RunConfig(data=data), "out is not set"),
        (RunConfig(data=DataConfig(source="tokens"), out="x"), "these are prepared already"),
        (RunConfig(data=DataConfig(tokenizer=TOKENIZER), out="x"), "nothing to prepare"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(run)
    out = tmp_path / "out"
    prepare(RunConfig(data=data, out=str(out)))
    other = str(real_data / "llama-checkpoint/tok512.model")
    with pytest.raises(UserError, match=r"was tokenized with data/shakespeare/tokenizer.model, which is not"):
        training_batches(tokens_config(data, out), load_tokenizer(other), batch_size=1, micro_batches=1, seed=0)
    with pytest.raises(UserError, match="choose another folder"):
        prepare(RunConfig(data=config(data.train, tokenizer=other), out=str(out)))
    (out / "train" / "00000.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes instead of"):
        training_batches(tokens_config(data, out), tokenizer, batch_size=1, micro_batches=1, seed=0)
    bad = DataConfig(**{**vars(tokens_config(data, out)), "train": [str(out / "tran")]})
    with pytest.raises(UserError, match=r"there is no folder .*did you mean .*/out/train\?"):
        training_batches(bad, tokenizer, batch_size=1, micro_batches=1, seed=0)
