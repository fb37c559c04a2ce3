"""One of two processes that open corpora together; what it was told goes into a JSON file. See test_ranks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data import files, load_tokenizer, training_batches, validation_batches
from tests.data.corpora import TOKENIZER


class Hub:
    """Stands for a remote store: counts what it is asked for, and has the files of a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.listings, self.opened = folder, 0, 0

    def glob(self, path: str) -> list[str]:
        self.listings += 1
        return [f"bucket/{file.name}" for file in self.folder.glob(Path(path).name)]

    def open(self, path: str, *_: Any, **__: Any) -> Any:
        self.opened += 1
        return (self.folder / Path(path).name).open("rb")


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    tokenizer, hub = load_tokenizer(TOKENIZER), Hub(folder / "hub")
    files._filesystem = lambda address, revision: (hub, address.removeprefix("s3://"))
    found: dict[str, Any] = {}

    def try_open(name: str, train: list[str], source: Any = "jsonl") -> None:
        data = DataConfig(train=train, validation=train, source=source, tokenizer=TOKENIZER, seq_len=32, repeat=False)
        options = {"rank": rank, "world_size": 2, "batch_size": 2}
        try:
            training_batches(data, tokenizer, micro_batches=1, seed=0, **options)
            validation_batches(data, tokenizer, **options)
            found[name] = "opened"
        except UserError as error:
            found[name] = error.faults

    try_open("same", [str(folder / "same" / "*.jsonl")])
    try_open("hub", ["s3://bucket/*.jsonl"])
    found["listings"], found["opened"] = hub.listings, hub.opened
    try_open("nothing on the hub", ["s3://bucket/*.parquet"])
    mine = folder / f"node-{rank}"
    try_open("other sizes", [str(mine / "sizes" / "*.jsonl")])
    try_open("other names", [str(mine / "names" / "*.jsonl")])
    try_open("missing", [str(mine / "missing" / "a.jsonl")])
    try_open("other tokens", [str(mine / "tokens" / "train")], "tokens")
    try_open("same again", [str(folder / "same" / "*.jsonl")])
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
