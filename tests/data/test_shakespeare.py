"""The bundled corpus: split by work, free of foreign matter, and made by the script beside it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from lowrank_train.data import load_tokenizer

Documents = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def script(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shakespeare", project_root / "data" / "make_shakespeare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(project_root: Path) -> Documents:
    splits = {}
    for split in ("train", "validation"):
        with gzip.open(project_root / "data" / "shakespeare" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            splits[split] = [json.loads(line) for line in lines]
    return splits


def test_split_by_work(bundle: Documents, script: ModuleType) -> None:
    works = {split: {document["url"].split(":")[2] for document in documents} for split, documents in bundle.items()}
    assert works["validation"] == set(script.VALIDATION_WORKS)
    assert not works["train"] & works["validation"]
    assert len(works["train"]) == 39
    urls = [document["url"] for documents in bundle.values() for document in documents]
    assert len(urls) == len(set(urls)) == 943
    training_text = {line for document in bundle["train"] for line in document["text"].splitlines() if len(line) > 50}
    held_out = {line for document in bundle["validation"] for line in document["text"].splitlines() if len(line) > 50}
    assert len(held_out & training_text) <= 2 and len(held_out) > 1000


def test_nothing_but_shakespeare(bundle: Documents) -> None:
    foreign = re.compile(
        r"gutenberg|\be-?texts?\b|copyright|https?:|www\.|footnote|transcri|dramatis person|persons represented|"
        r"public domain|<\w|&\w+;|[{}|\\<>@#]|_{3}|^THE END$|by William Shakespeare",
        re.IGNORECASE | re.MULTILINE,
    )
    for documents in bundle.values():
        for document in documents:
            assert not foreign.search(document["text"]), document["url"]
            assert document.keys() == {"text", "timestamp", "url"}
            assert 200 < len(document["text"]) < 50_000
            assert document["text"] == document["text"].strip()
            assert "  " not in document["text"] and "\n\n\n" not in document["text"]
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["timestamp"])


def test_the_readme_counts(bundle: Documents, project_root: Path) -> None:
    readme = (project_root / "data" / "shakespeare" / "README.md").read_text()
    tokenizer = load_tokenizer("data/shakespeare/tokenizer.model")
    for split, documents in bundle.items():
        texts = [document["text"] for document in documents]
        tokens = sum(map(len, tokenizer.encode(texts)))
        counts = f"{len(texts)} documents, {sum(map(len, texts)):,} characters, {tokens:,} tokens"
        assert f"`{split}.jsonl.gz` | {counts}" in readme


def test_the_tokenizer_is_the_scripts(bundle: Documents, script: ModuleType, project_root: Path) -> None:
    """Trained on the training split alone, and the same pieces again."""
    from sentencepiece import SentencePieceProcessor

    bundled = SentencePieceProcessor(model_file=str(project_root / "data" / "shakespeare" / "tokenizer.model"))
    again = SentencePieceProcessor(model_proto=script.train_tokenizer(bundle["train"]))
    assert [bundled.id_to_piece(id_) for id_ in range(2048)] == [again.id_to_piece(id_) for id_ in range(2048)]
    assert (bundled.pad_id(), bundled.eos_id(), bundled.unk_id(), bundled.bos_id()) == (0, 1, 2, -1)


def test_writing_twice_gives_the_same_bytes(bundle: Documents, script: ModuleType, tmp_path: Path) -> None:
    for name in ("one.gz", "two.gz"):
        script.write_documents(tmp_path / name, bundle["validation"])
    content = (tmp_path / "one.gz").read_bytes()
    assert content == (tmp_path / "two.gz").read_bytes()
    assert [json.loads(line) for line in gzip.decompress(content).splitlines()] == bundle["validation"]


def test_splitting(script: ModuleType) -> None:
    play = b"""THE PLAY\n\nby William Shakespeare\n\nPERSONS REPRESENTED.\n\nA KING.\n\nPROLOGUE.\n\nTwo households,\n
ACT FIRST.\n\nSCENE I. A street.\n\n  KING.   \n  No  more.{Exit.]\n\nPROLOGUE.\nI play.\n
SCENE II.\n\nFOOL.\nNuncle.\n
ACT II.\n\nEnter GOWER.\n\nSCENE IV. A heath.\n\nRain.\n\nEPILOGUE\n\nNow my charms\n\nTHE END\n"""
    documents = {
        document["url"].removeprefix("urn:shakespeare:the_play:"): document["text"]
        for document in script.documents_of("the_play", play, 0.0)
    }
    assert documents == {
        "prologue": "PROLOGUE.\n\nTwo households,",
        "act-1:scene-1": "ACT FIRST.\n\nSCENE I. A street.\n\nKING.\nNo more.[Exit.]\n\nPROLOGUE.\nI play.",
        "act-1:scene-2": "SCENE II.\n\nFOOL.\nNuncle.",
        "act-2:opening": "Enter GOWER.",
        "act-2:scene-4": "ACT II.\n\nSCENE IV. A heath.\n\nRain.",
        "epilogue": "EPILOGUE\n\nNow my charms",
    }
    assert [script.number_of(name) for name in ("I", "iv", "IX", "XIV", "3", "FIFTH")] == [1, 4, 9, 14, 3, 5]
