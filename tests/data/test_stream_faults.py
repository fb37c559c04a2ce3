"""The training stream over faulty files: counted, named and skipped, or an error in the user's words."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from lowrank_train.config.errors import UserError
from lowrank_train.data import Tokenizer, training_batches
from tests.data.corpora import config, document, streams, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores


def test_bad_documents_are_counted_and_skipped(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps({"text": document(n)}).encode() for n in range(8)]
    bad = [b"{not json", b'{"txt": "x"}', b'{"text": ""}', b'{"text": 3}', b'{"text": "\xff"}', b"[1, 2]", b""]
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join(line for pair in itertools.zip_longest(good, bad, fillvalue=b"") for line in pair))
    for packing in ("pad", "concat"):
        batches = training_batches(
            config([str(file)], packing=packing, repeat=False), tokenizer, batch_size=4, micro_batches=1, seed=0
        )
        seen = [name for batch in batches for name in batch["documents"]]
        assert seen == [f"mixed.jsonl:{line}" for line in range(1, 17, 2)]
        assert batches.skipped == {
            "not JSON": 1,
            "no text under 'text'": 2,
            "empty text": 1,
            "not UTF-8": 1,
            "not a JSON object": 1,
        }
    assert "skipped: not JSON at mixed.jsonl:2" in caplog.text


def test_truncated_gzip_is_read_as_far_as_it_goes(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    # Incompressible enough that a cut leaves whole lines before it.
    texts = [hashlib.sha256(str(n).encode()).hexdigest() * 4 for n in range(3000)]
    whole = write_jsonl(tmp_path / "a.json.gz", texts)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    write_jsonl(tmp_path / "b.json.gz", [document(1)])
    data = config([str(tmp_path)], packing="pad", repeat=False)
    batches = training_batches(data, tokenizer, batch_size=50, micro_batches=1, seed=0)
    seen = [name for batch in batches for name in batch["documents"]]
    assert 1000 < len(seen) < 2000 and len(set(seen)) == len(seen)
    assert seen[-1] == "b.json.gz:1"
    assert sum(count for kind, count in batches.skipped.items() if kind.startswith("damaged file")) == 1
    assert f"a.json.gz:{len(seen)}" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_worker_is_the_users_message(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    """One lane's files hold nothing readable: an error without a traceback in its text, not an endless search."""
    write_jsonl(tmp_path / "a.jsonl", [document(1)])
    (tmp_path / "b.jsonl").write_text("rubbish\n")
    data = config([str(tmp_path)], num_workers=workers)
    with pytest.raises(UserError, match="no readable document") as caught:
        next(streams(data, tokenizer, 2)[1])
    assert "Traceback" not in str(caught.value)


def test_a_position_of_another_corpus_is_refused(shards: list[str], tokenizer: Tokenizer) -> None:
    position = next(streams(config(shards, shuffle_documents=7), tokenizer, 1)[0])["position"]
    for changes, message in (
        ({"packing": "pad"}, "data.packing=pad: the checkpoint has concat"),
        ({"shuffle_documents": 8}, "set data.shuffle_documents=7"),
        ({"train": shards[:2], "shuffle_documents": 7}, "files are not those"),
    ):
        with pytest.raises(UserError, match=message):
            streams(config(**{"train": shards, "shuffle_documents": 7, **changes}), tokenizer, 1, position=position)
