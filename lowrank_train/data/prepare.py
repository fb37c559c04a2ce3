"""`lowrank data prepare`: tokenizes a corpus once into shards on disk, file by file, going on where it was stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowrank_train.config.errors import EXIT_DISK_FULL, RunStopped, UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data.documents import Source, check_readable, open_source
from lowrank_train.data.files import is_remote
from lowrank_train.data.tokenizer import Tokenizer, tokenizer_of
from lowrank_train.data.tokens import INDEX, Shard, file_sha256, read_index, write_aside, write_index

log = logging.getLogger(__name__)

ENCODED_TOGETHER = 256  # documents
SAMPLED_DOCUMENTS = 2000  # whose tokens foretell the size of the rest


def prepare(config: RunConfig) -> int:
    """Tokenizes `data.train` and `data.validation` into `out`/train and `out`/validation; gives the exit code.

    Shards that are already there are checked against their checksums and kept.

    Raises:
        UserError: `out` is missing or holds shards of another tokenizer, the corpus is not readable, or the disk is
            too small.
        RunStopped: the disk is full; finished shards stay.
    """
    data = config.data
    if not config.out:
        raise UserError("out is not set: lowrank data prepare needs a folder to write to (out=FOLDER)")
    if data.source == "tokens":
        raise UserError("data.source=tokens: these are prepared already; choose the text, e.g. data=c4")
    tokenizer = tokenizer_of(config)
    splits = {"train": data.train, "validation": data.validation}
    sources = {split: open_source(data, split, tokenizer) for split, addresses in splits.items() if addresses}
    if not sources:
        raise UserError("data.train and data.validation are empty: there is nothing to prepare")
    out = Path(config.out)
    for split, source in sources.items():
        check_readable(source, key=f"data.{split}")
        _check_folder(out / split, tokenizer)
    _check_disk(out, sources, tokenizer)
    try:
        for split, source in sources.items():
            _prepare_split(split, source, out / split, tokenizer, data.tokenizer, data.num_workers)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunStopped(
            f"the disk of {out} is full; the shards that are finished stay, and the same command goes on from them",
            EXIT_DISK_FULL,
        ) from error
    keys = " ".join(f"data.{split}=[{out / split}]" for split in sources)
    print(f"\nTo train on them:  data=tokens {keys} data.tokenizer={data.tokenizer}")
    return 0


def _bytes_per_token(tokenizer: Tokenizer) -> int:
    return 2 if tokenizer.vocab_size <= 2**16 else 4


def _check_folder(folder: Path, tokenizer: Tokenizer) -> None:
    if (folder / INDEX).exists() and (index := read_index(folder))["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise UserError(f"out: {folder} holds shards tokenized with {index['tokenizer']}; choose another folder")


def _check_disk(out: Path, sources: dict[str, Source], tokenizer: Tokenizer) -> None:
    """Says how much will be written, as far as it can be foretold, and refuses if the disk cannot hold it."""
    needed_bytes = 0
    for source in sources.values():
        if any(is_remote(file) for file in source.files):
            log.info("the size of remote files is not known before they are read")
            return
        sampled = list(islice(source.slots(0), SAMPLED_DOCUMENTS))
        text_bytes = sum(len(slot.payload) for slot in sampled)
        tokens = sum(map(len, source.encode(sampled)))
        source.take_faults()
        # Text compresses about 2.6-fold with gzip -6: C4's shards and the bundled corpus both do.
        whole = sum(Path(file).stat().st_size * (2.6 if file.endswith((".gz", ".zst", ".xz", ".bz2")) else 1)
                    for file in source.files)  # fmt: skip
        needed_bytes += int(whole * tokens / max(1, text_bytes) * _bytes_per_token(tokenizer))
    out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out).free
    present_bytes = sum(file.stat().st_size for split in sources for file in (out / split).glob("*.bin"))
    print(f"about {needed_bytes / 2**20:.1f} MiB of tokens; {free_bytes / 2**20:.0f} MiB are free in {out}")
    if needed_bytes - present_bytes > free_bytes:
        raise UserError(
            f"out={out}: about {needed_bytes / 2**30:.1f} GiB are needed, {free_bytes / 2**30:.1f} are free"
        )


def _prepare_split(
    split: str, source: Source, folder: Path, tokenizer: Tokenizer, tokenizer_name: str, num_workers: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(source.files))
    shards: list[Shard] = []
    with _progress(split, len(source.files)) as report:
        for shard, skipped in _made(source, folder, tokenizer, numbers, num_workers):
            shards.append(shard)
            report(shard, skipped)
    write_index(folder, shards, tokenizer=tokenizer, tokenizer_name=tokenizer_name)


@contextmanager
def _progress(split: str, files: int) -> Iterator[Callable[[Shard, dict[str, int]], None]]:
    """Gives a function to call after every shard: a bar on a terminal, a line elsewhere."""
    totals = Counter[str]()
    console = Console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(split, total=files, counts="")

        def report(shard: Shard, skipped: dict[str, int]) -> None:
            totals.update(files=1, documents=shard.documents, tokens=shard.tokens)
            counts = f"{totals['documents']:,} documents, {totals['tokens']:,} tokens"
            bar.update(task, advance=1, counts=counts)
            if not console.is_terminal:
                print(f"{split}: {shard.source} ({totals['files']} of {files} files), {counts}", flush=True)
            for kind, count in skipped.items():
                log.warning("%s: skipped %d: %s", shard.source, count, kind)

        yield report


def _made(
    source: Source, folder: Path, tokenizer: Tokenizer, numbers: range, num_workers: int
) -> Iterator[tuple[Shard, dict[str, int]]]:
    """Shards in the order of their files, made in `num_workers` processes or in this one."""
    if num_workers == 0:
        yield from (make_shard(source, number, folder, tokenizer) for number in numbers)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        futures = [pool.submit(make_shard, source, number, folder, tokenizer) for number in numbers]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def make_shard(source: Source, number: int, folder: Path, tokenizer: Tokenizer) -> tuple[Shard, dict[str, int]]:
    """Tokenizes one file, unless its shard is there with the right checksums; gives the shard and what was skipped."""
    name = f"{number:05d}"
    description = folder / f"{name}.json"
    identity = hashlib.sha256(f"{source.files[number]} {tokenizer.fingerprint}".encode()).hexdigest()
    if description.exists():
        saved = json.loads(description.read_text())
        shard = Shard(**saved["shard"])
        if saved["identity"] == identity and shard.fault(folder, checksums=True) is None:
            return shard, {}
    dtype: np.dtype[Any] = np.dtype(np.uint16 if _bytes_per_token(tokenizer) == 2 else np.uint32)
    ids_path, offsets_path = folder / f"{name}.bin", folder / f"{name}.offsets"
    aside = ids_path.with_name(ids_path.name + ".partial")
    with aside.open("wb") as stream:
        offsets = _write_ids(source, number, stream, dtype)
    aside.replace(ids_path)
    write_aside(offsets_path, np.asarray(offsets, dtype=np.int64).tobytes())
    skipped = Counter(fault.kind for fault in source.take_faults())
    shard = Shard(
        name=name,
        source=source.names[number],
        documents=len(offsets) - 1,
        tokens=offsets[-1],
        skipped=sum(skipped.values()),
        dtype=dtype.name,
        sha256=file_sha256(ids_path),
        offsets_sha256=file_sha256(offsets_path),
    )
    # Last: a shard without its description is made again.
    write_aside(description, json.dumps({"identity": identity, "shard": asdict(shard)}).encode())
    return shard, dict(skipped)


def _write_ids(source: Source, number: int, stream: BinaryIO, dtype: np.dtype[Any]) -> list[int]:
    """Writes the ids of every good document of a file; gives where each begins, and the end."""
    offsets = [0]
    slots = source.slots(number)
    while read := list(islice(slots, ENCODED_TOGETHER)):
        for ids in source.encode(read):
            if ids:
                stream.write(np.asarray(ids, dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids))
    return offsets
