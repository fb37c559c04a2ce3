"""Turns a SentencePiece model into a fast Hugging Face tokenizer that gives the same ids."""

from __future__ import annotations

from typing import Any

from lowrank_train.config.errors import UserError

# The numbers of a piece's type and of the kind of model in sentencepiece_model.proto.
_NORMAL, _USER_DEFINED = 1, 4
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"


def convert(model: bytes) -> Any:
    """A `PreTrainedTokenizerFast` equal to the SentencePiece model `model` (unigram or BPE).

    `transformers` has converters of its own, each for one family: LLaMA's, for instance, keeps the double spaces that
    most models remove. This one follows what the model file says.

    Raises:
        UserError: the model is of another kind (word, char).
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Regex as Pattern
    from transformers import PreTrainedTokenizerFast

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    if trainer.model_type == _UNIGRAM:
        scored = [(piece, score) for piece, score, _ in pieces]
        backend = Tokenizer(models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    elif trainer.model_type == _BPE:
        vocabulary = {piece: id_ for id_, (piece, _, _) in enumerate(pieces)}
        backend = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=_merges(pieces),
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        raise UserError("data.tokenizer: only unigram and BPE SentencePiece models have a Hugging Face form")

    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Pattern(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    # A user-defined symbol of one character, such as a line break, is a piece like any other. A longer one is split off
    # first; where a text spells one, the spaces around it may come out differently.
    symbols = [piece for piece, _, kind in pieces if kind == _USER_DEFINED and len(piece) > 1]
    backend.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])
    # Not "first", which forgets the prefix where normalizing removes the first character of a text, such as U+200B.
    prefix: Any = "always" if normalizer.add_dummy_prefix else "never"
    # Unigram pieces never cross a space, so splitting there first is the same and faster.
    split = trainer.model_type == _UNIGRAM
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=prefix, split=split)
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []))

    special = {"eos_token": trainer.eos_id, "bos_token": trainer.bos_id, "pad_token": trainer.pad_id}
    named = {key: pieces[id_][0] for key, id_ in special.items() if id_ >= 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=pieces[trainer.unk_id][0],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merges of a BPE model: SentencePiece stores only the results, best score first."""
    known = {piece: id_ for id_, (piece, _, kind) in enumerate(pieces) if kind == _NORMAL}
    merges = []
    for piece, score, kind in pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((-score, known[left], known[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
