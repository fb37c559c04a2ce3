"""Readers of documents: where plain text is cut, and what a corpus nobody can read is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_train.config.errors import UserError
from lowrank_train.data import Tokenizer, load_tokenizer, training_batches
from lowrank_train.data.documents import TEXT_DOCUMENT_LIMIT_BYTES, open_source
from tests.data.corpora import TOKENIZER, config, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


def texts(path: Path, tokenizer: Tokenizer, start: int = 0) -> list[str]:
    source = open_source(config([str(path)], source="text"), "train", tokenizer)
    slots = [slot for file in range(len(source.files)) for slot in source.slots(file, start)]
    return [tokenizer.decode(ids) for ids in source.encode(slots)]


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paragraph = "\n".join(f"Line {number} of some text that goes on." for number in range(30))  # 1.1 kB
    path = tmp_path / "book.txt"
    path.write_bytes("\r\n\r\n".join([paragraph] * 10).encode("utf-8-sig"))
    parts = texts(path, tokenizer)
    assert parts == ["\n\n".join([paragraph] * count) for count in (4, 4, 2)]
    assert texts(path, tokenizer, start=1) == parts[1:]


def test_plain_text_without_blank_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "log.txt"
    path.write_text("A line and no blank one.\n" * 5000)
    parts = texts(path, tokenizer)
    assert "".join(part + "\n" for part in parts) == path.read_text()
    assert len(parts) == 2 and len(parts[0]) >= TEXT_DOCUMENT_LIMIT_BYTES - 1


def test_small_files_are_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"File {number}.\n\nSecond paragraph.\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert texts(tmp_path, tokenizer) == [f"File {number}.\n\nSecond paragraph." for number in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("a.jsonl", b"", {}, "no document can be read from .*a.jsonl: the files are empty"),
        ("a.jsonl", b"\n\n", {}, "the files are empty"),
        (
            "a.jsonl",
            b'{"txt": "x"}\n' * 9,
            {},
            r"no text under 'text' \(9\).*there: txt; did you mean data.text_key=txt",
        ),
        ("a.jsonl", b'{"body": "x", "n": 1}\n', {}, "Keys with text there: body; set data.text_key to one of them"),
        ("a.json", json.dumps([{"text": "x"}], indent=1).encode(), {}, "looks like one JSON array"),
        ("a.jsonl", b"Once upon a time\n", {}, r"not JSON \(1\). For plain text set data.source=text"),
        ("a.jsonl.gz", b"not gzip at all", {}, "damaged file"),
        ("a.txt", b"\xff\xfe\x00" * 99, {"source": "text"}, "not UTF-8"),
        ("a.txt", b"\0\0\0", {"source": "text"}, "binary data"),
        ("a.csv", b"x", {}, "has no file ending in .jsonl"),
    ],
)
def test_nothing_readable(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, changes: dict[str, str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    data = config([str(tmp_path)], **changes)
    with pytest.raises(UserError, match=message):
        training_batches(data, tokenizer, batch_size=1, micro_batches=1, seed=0)


def test_an_unreadable_file_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"data.train: .*folder.jsonl"):
        training_batches(config([str(tmp_path / "folder.jsonl")]), tokenizer, batch_size=1, micro_batches=1, seed=0)


def test_names_of_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Files of one name in two folders are told apart."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "a.jsonl", ["Who's there?"])
    source = open_source(config([str(tmp_path / "one"), str(tmp_path / "two")]), "train", tokenizer)
    assert [source.document_id(next(source.slots(file))) for file in (0, 1)] == [
        f"{tmp_path}/{folder}/a.jsonl:1" for folder in ("one", "two")
    ]


def test_native_c4(real_data: Path, tokenizer: Tokenizer) -> None:
    data = config([str(real_data / "c4/c4-train.00000-of-01024.head1000.json.gz")], packing="pad", repeat=False)
    batches = training_batches(data, tokenizer, batch_size=64, micro_batches=1, seed=0)
    seen = [name for batch in batches for name in batch["documents"]]
    assert seen == [f"c4-train.00000-of-01024.head1000.json.gz:{line}" for line in range(1, 1001)]
    assert not batches.skipped
