"""Tokenizers: every way to name one, the same ids after `save`, and no special token out of plain text."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import shutil
from pathlib import Path

import pytest

from lowrank_train.config.errors import UserError
from lowrank_train.data import Tokenizer, load_tokenizer
from lowrank_train.data.tokenizer import SAMPLE_TEXTS, HuggingFaceTokenizer, SentencePieceTokenizer

BUNDLED = "data/shakespeare/tokenizer.model"


def c4_texts(real_data: Path) -> list[str]:
    with gzip.open(real_data / "c4" / "c4-en-sample1000.ai2.json.gz") as lines:
        return [json.loads(line)["text"] for line in lines]


def save_and_load(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    # An exported folder says what model it holds, which must not change how its tokenizer is read.
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    tokenizer.save(folder)
    return load_tokenizer(str(folder))


def test_bundled(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BUNDLED)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (2048, 0, 1, None)
    text = "HAMLET.\nWho's  there?\n\nNay, 漢字 🙂</s>\n"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, 1, 0, 2048, 40_000]) == text

    saved = save_and_load(tokenizer, tmp_path)
    assert isinstance(saved, HuggingFaceTokenizer)
    assert saved.fingerprint == tokenizer.fingerprint
    assert (saved.vocab_size, saved.pad_id, saved.eos_id, saved.bos_id) == (2048, 0, 1, None)
    with gzip.open(Path(BUNDLED).parent / "validation.jsonl.gz") as lines:
        scenes = [json.loads(line)["text"] for line in lines]
    assert saved.encode(scenes) == tokenizer.encode(scenes)
    assert [saved.decode(ids) for ids in saved.encode(scenes)] == scenes
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode(scenes) == tokenizer.encode(scenes)


def test_goes_to_worker_processes() -> None:
    tokenizer = load_tokenizer(BUNDLED)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(["To be"]) == tokenizer.encode(["To be"])  # noqa: S301


@pytest.mark.parametrize(
    ("name", "vocab_size", "eos_id", "pad_id", "differing"),
    [
        # One document of a thousand in the other C4 sample differs, in `transformers`' own T5 tokenizer too.
        ("tokenizers/t5-base/spiece.model", 32000, 1, 0, 0),
        ("tokenizers/t5-base", 32000, 1, 0, 0),
        ("tokenizers/c4-bpe-32k", 32000, 1, 0, 0),
        ("llama-checkpoint/tok512.model", 512, 2, None, 0),
        ("llama-checkpoint/stories260K-hf", 512, 2, None, 0),
        ("tokenizers/gpt2", 50257, 50256, None, 0),
    ],
)
def test_published_tokenizers(
    real_data: Path, tmp_path: Path, name: str, vocab_size: int, eos_id: int, pad_id: int | None, differing: int
) -> None:
    tokenizer = load_tokenizer(str(real_data / name))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (vocab_size, eos_id, pad_id)
    texts = c4_texts(real_data)[:100]
    ids = tokenizer.encode(texts)
    assert max(max(document) for document in ids) < vocab_size
    saved = save_and_load(tokenizer, tmp_path)
    assert saved.fingerprint == tokenizer.fingerprint
    assert sum(one != other for one, other in zip(ids, saved.encode(texts), strict=True)) == differing


def test_t5_by_sentencepiece_and_by_transformers(real_data: Path) -> None:
    """The papers use `transformers`' T5; the model file gives the same ids, four times as fast, and the same prints."""
    by_file = load_tokenizer(str(real_data / "tokenizers/t5-base/spiece.model"))
    by_folder = load_tokenizer(str(real_data / "tokenizers/t5-base"))
    assert by_file.fingerprint == by_folder.fingerprint
    texts = c4_texts(real_data)[:100]
    assert by_file.encode(texts) == by_folder.encode(texts)


@pytest.mark.parametrize("name", ["tokenizers/t5-base", "tokenizers/gpt2", "llama-checkpoint/stories260K-hf"])
def test_a_text_cannot_spell_a_special_token(real_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(real_data / name))
    (ids,) = tokenizer.encode(["a </s> b <pad> c <extra_id_0> d <|endoftext|> e <s> f"])
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} & set(ids)
    assert max(ids) < tokenizer.vocab_size


def test_save_refuses_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(BUNDLED)
    monkeypatch.setattr(tokenizer, "encode", lambda texts: [[5, 6, 7]] * len(texts))
    with pytest.raises(UserError, match=r"becomes \[.*\], in ours \[5, 6, 7\]"):
        tokenizer.save(tmp_path)


def test_samples_tell_tokenizers_apart(real_data: Path) -> None:
    """The two readings of one LLaMA vocabulary differ in how they treat double spaces."""
    by_file = load_tokenizer(str(real_data / "llama-checkpoint/tok512.model"))
    by_folder = load_tokenizer(str(real_data / "llama-checkpoint/stories260K-hf"))
    assert by_file.fingerprint != by_folder.fingerprint
    assert any("  " in text for text in SAMPLE_TEXTS)


def test_normalization_and_symbols(tmp_path: Path) -> None:
    """Unigram and BPE models with a character map, trimmed spaces and a symbol of several letters survive `save`."""
    import io

    from sentencepiece import SentencePieceTrainer

    with gzip.open(Path(BUNDLED).parent / "validation.jsonl.gz") as lines:
        sentences = [line for one in lines for line in json.loads(one)["text"].splitlines() if line]
    for kind, symbols in itertools.product(("bpe", "unigram"), ([], ["<turn>"])):
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=600,
            user_defined_symbols=symbols,
            minloglevel=2,
        )
        folder = tmp_path / f"{kind}{len(symbols)}"
        folder.mkdir()
        (folder / "m.model").write_bytes(model.getvalue())
        tokenizer = load_tokenizer(str(folder))
        saved = save_and_load(tokenizer, folder)
        texts = [*sentences[:500], "ﬁne  ½\tTab\n ", "  two \u200bspaces", "\u200bone"]
        assert saved.encode(texts) == tokenizer.encode(texts)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data.tokenizer is empty"),
        (
            "data/shakespeare/tokeniser.model",
            r"no such file or folder; did you mean data/shakespeare/tokenizer.model\?",
        ),
        ("google-t5/t5-base", r"HF_HUB_OFFLINE is set.*hf download google-t5/t5-base"),
        ("data/shakespeare/README.md", "is not a SentencePiece model"),
        ("conf", "holds no tokenizer that loads"),
    ],
)
def test_what_is_no_tokenizer(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_a_damaged_json(tmp_path: Path, real_data: Path) -> None:
    shutil.copy(real_data / "tokenizers/gpt2/merges.txt", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
