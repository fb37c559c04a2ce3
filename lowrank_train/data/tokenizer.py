"""Tokenizers behind one small interface: a SentencePiece model, a tokenizer.json, a Hugging Face folder or hub name."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data.files import did_you_mean, find_local
from lowrank_train.data.hub import download_command, out_of_reach, why_not

# What `save` compares and what a fingerprint covers: words, digits, spaces, line breaks, contractions, foreign letters.
SAMPLE_TEXTS = (
    "Hello world!",
    "O Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father, and refuse thy name;\n\nExeunt.",
    "In 1998, 3.14159 of 100,000 people (about 0.003 %) paid $42 for it -- didn't they?",
    "def f(x):\n    return {x: [1, 2]}  # two  spaces",
    "A café in Zürich, naïve façade, smörgåsbord; μ and Ω; “quotes” – dashes…",
)
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer(ABC):
    """Text to ids and back; `encode` adds no special tokens, and a text cannot spell one."""

    vocab_size: int  # every id that `encode` can give, and the special ids below, is smaller
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    chat_template: str | None = None  # Jinja, by which conversations become text

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of every text; many at a time is faster than one by one."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""

    @abstractmethod
    def to_hugging_face(self) -> Any:
        """The same tokenizer as a `transformers` object."""

    @abstractmethod
    def _pieces(self) -> list[tuple[str, int]]:
        """(piece, id) of the vocabulary."""

    @property
    def begin_id(self) -> int | None:
        """The begin mark, where the tokenizer itself puts it before every text; our own SentencePiece models do not."""
        return None

    @property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, the special ids and the ids of a few texts; equal before and after `save`."""
        if not hasattr(self, "_fingerprint"):
            pieces = sorted((id_, piece) for piece, id_ in self._pieces() if id_ < self.vocab_size)
            special = [self.vocab_size, self.eos_id, self.bos_id, self.pad_id]
            content = json.dumps([pieces, special, self.encode(list(SAMPLE_TEXTS))])
            self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return self._fingerprint

    def save(self, folder: Path | str) -> None:
        """Writes the files that `AutoTokenizer` loads offline and without remote code, and checks that ids agree.

        Raises:
            UserError: the Hugging Face form gives other ids on one of the sample texts.
        """
        from transformers import AutoTokenizer

        files = self.to_hugging_face()
        files.chat_template = self.chat_template
        files.save_pretrained(str(folder))
        saved = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        for text, ids in zip(SAMPLE_TEXTS, self.encode(list(SAMPLE_TEXTS)), strict=True):
            theirs = saved(text, add_special_tokens=False)["input_ids"]
            if theirs != ids:
                raise UserError(
                    f"data.tokenizer: in the Hugging Face form {text!r} becomes {theirs}, in ours {ids}; "
                    f"{folder} cannot be used with AutoTokenizer"
                )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file, read by SentencePiece itself."""

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = model
        self._processor = SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()
        # SentencePiece says -1 where there is no such token.
        self.eos_id, self.bos_id, self.pad_id = (
            id_ if id_ >= 0 else None
            for id_ in (self._processor.eos_id(), self._processor.bos_id(), self._processor.pad_id())
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than the tokenizer has pieces and, untrained, sample them.
        return self._processor.decode([int(id_) for id_ in ids if id_ < self.vocab_size])

    def to_hugging_face(self) -> Any:
        from lowrank_train.data.sentencepiece_to_hf import convert

        return convert(self.model)

    def _pieces(self) -> list[tuple[str, int]]:
        return [(self._processor.id_to_piece(id_), id_) for id_ in range(self.vocab_size)]


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of `transformers`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_id, self.bos_id, self.pad_id = (
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
            tokenizer.pad_token_id,
        )
        template = tokenizer.chat_template  # of several, by name, the one for plain conversations
        self.chat_template = template.get("default") if isinstance(template, dict) else template
        kept = {self.eos_id, self.bos_id, self.pad_id, tokenizer.unk_token_id}
        special = set(tokenizer.all_special_ids)
        # T5 has 100 sentinels above its 32,000 pieces, which no text needs and the papers' models have no rows for.
        self.vocab_size = 1 + max(set(tokenizer.get_vocab().values()) - (special - kept))
        self._forbidden = special - {tokenizer.unk_token_id}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.encode_special_tokens = True
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            batch = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            batch = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # A unigram vocabulary holds its special tokens as pieces, so `</s>` in a text would become the token.
        return [
            ids if self._forbidden.isdisjoint(ids) else [id_ for id_ in ids if id_ not in self._forbidden]
            for ids in batch
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(id_) for id_ in ids if id_ < self.vocab_size], skip_special_tokens=True))

    def to_hugging_face(self) -> Any:
        return self._tokenizer

    @property
    def begin_id(self) -> int | None:
        # Of a copy: a call sets the way special tokens in a text are read.
        ids = copy.deepcopy(self._tokenizer)("a")["input_ids"]
        return self.bos_id if self.bos_id is not None and ids[:1] == [self.bos_id] else None

    def _pieces(self) -> list[tuple[str, int]]:
        return list(self._tokenizer.get_vocab().items())


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run; a model's own, from the hub, is that of `model.revision`. UserError as load_tokenizer."""
    data, model = config.data, config.model
    own = data.tokenizer == model.path
    try:
        return load_tokenizer(data.tokenizer, data.chat_template, revision=model.revision if own else None)
    except UserError as error:
        raise UserError(f"model.path={model.path}: {error}" if own else error.faults) from error


def load_tokenizer(path: str, chat_template: str | None = None, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer `path` names: a `.model` or `tokenizer.json` file, a folder, or a name on the hub.

    `chat_template`: in place of its own. `revision`: the commit, of a name on the hub.

    Relative paths are looked for from the current folder, then from the project's root. Nothing is downloaded unless
    `path` is a hub name that is not in the cache; no code of a repository is ever run.

    Raises:
        UserError: there is no such file, folder or name, or it is not a tokenizer.
    """
    tokenizer = _load(path, revision)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _load(path: str, revision: str | None) -> Tokenizer:
    if not path:
        raise UserError("data.tokenizer is empty: give a .model file, a tokenizer.json, a folder or a hub name")
    found = find_local(path)
    if found is None:
        return _from_hub(path, revision)
    if found.is_dir():
        models = sorted(found.glob("*.model"))
        described = any((found / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        if len(models) == 1 and not described:
            return _from_sentencepiece(models[0])
        return _from_folder(found)
    if found.suffix == ".json":
        described = found.name == "tokenizer.json" and (found.parent / "tokenizer_config.json").exists()
        return _from_folder(found.parent) if described else _from_json(found)
    return _from_sentencepiece(found)


def _from_sentencepiece(path: Path) -> Tokenizer:
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except RuntimeError as error:  # what SentencePiece raises when it cannot parse
        raise UserError(f"data.tokenizer={path} is not a SentencePiece model: {error}") from error


def _from_json(path: Path) -> Tokenizer:
    """A bare tokenizer.json; its special tokens are known by their usual names."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # what the library raises for every fault in the file
        raise UserError(f"data.tokenizer={path} is not a tokenizer.json: {error}") from error
    vocabulary = backend.get_vocab()
    names = {"eos_token": _EOS_NAMES, "bos_token": _BOS_NAMES, "pad_token": _PAD_NAMES, "unk_token": ("<unk>", "[UNK]")}
    special = {key: next((name for name in known if name in vocabulary), None) for key, known in names.items()}
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))


def _from_folder(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"data.tokenizer={folder} holds no tokenizer that loads (found: {names}): {str(error).splitlines()[0]}"
        ) from error
    return HuggingFaceTokenizer(tokenizer)


def _from_hub(name: str, revision: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    looks_like_path = name.endswith((".model", ".json")) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path:
        raise UserError(f"data.tokenizer={name}: there is no such file or folder{did_you_mean(name)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        fetch = f"fetch it where there is a network ({download_command(name, revision)}), or "
        raise UserError(
            f"data.tokenizer={name} is neither a file or folder here nor a tokenizer the hub gives: {why_not(error)}; "
            f"{fetch if out_of_reach(error) else ''}set data.tokenizer to a folder or .model file"
        ) from error
    return HuggingFaceTokenizer(tokenizer)
