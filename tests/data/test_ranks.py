"""Two processes that open corpora together: one asks the hub, and both hear of every fault of either."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from lowrank_train.config.schema import RunConfig
from lowrank_train.data.prepare import prepare
from tests.data.corpora import config, document, write_jsonl


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks was told, by the name of the corpus; `node-0` and `node-1` are their own disks."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("same/a", "same/b", "hub/a", "hub/b", "node-0/missing/a"):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [document(number) for number in range(8)])
    for node in (0, 1):
        for kind in ("sizes", "names", "tokens"):
            (folder / f"node-{node}" / kind).mkdir(parents=True, exist_ok=True)
        for file in range(3):
            texts = [document(number) for number in range(8 - (file == 1) * node)]
            write_jsonl(folder / f"node-{node}/sizes/{file}.jsonl", texts)
        write_jsonl(folder / f"node-{node}/names/{'ab'[node]}.jsonl", [document(1)])
        # The same lengths, other texts: sizes alone would not tell.
        text = write_jsonl(folder / f"node-{node}.jsonl", [["To be.", "Be to."][node]])
        prepare(RunConfig(data=config([str(text)], validation=[]), out=str(folder / f"node-{node}/tokens")))
    command = [sys.executable, "-m", "tests.data.ranks_script"]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def test_one_rank_asks_the_hub(told: list[dict[str, Any]]) -> None:
    """The listing of train and of validation, and a look into the first file of each, are the first rank's."""
    assert [rank["same"] for rank in told] == [rank["hub"] for rank in told] == ["opened", "opened"]
    assert [rank["listings"] for rank in told] == [2, 0]
    assert [rank["opened"] for rank in told] == [2, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing on the hub", r"^data.train: s3://bucket/\*.parquet names no file$"),
        (
            "other sizes",
            r"rank 1 on \S+ sees other files than rank 0 .*: 1.jsonl of [\d,]+ bytes, there 1.jsonl of [\d,]+",
        ),
        ("other names", r"rank 1 on \S+ sees other .*: b.jsonl of \d+ bytes, there a.jsonl of \d+ bytes; copy"),
        ("missing", r"data.train: .*a.jsonl names no file.* \(found by rank 1 of 2, on \S+\)$"),
        ("other tokens", r"rank 1 on \S+ sees other files .*: 00000 with sha256 \w{64} and \w{64}, there 00000"),
    ],
)
def test_both_ranks_hear_of_it(told: list[dict[str, Any]], name: str, message: str) -> None:
    (fault,) = told[0][name]
    assert told[1][name] == [fault]
    assert re.search(message, fault), fault


def test_the_group_is_whole_after_faults(told: list[dict[str, Any]]) -> None:
    assert [rank["same again"] for rank in told] == ["opened", "opened"]
