"""Prompts of the validation data, for samples of what a model says to them while it learns."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from lowrank_train.data.chat.source import Examples
from lowrank_train.data.packing import token_ids

TEXT_PROMPT_TOKENS = 16  # of a text, which has no prompt of its own; of a shorter one half


class SamplePrompt(NamedTuple):
    """What is asked, and what the data answer."""

    example: str  # file:line
    ids: list[int]
    reference: list[int]  # of a conversation the first reply


def sample_prompts(found: Examples, count: int) -> list[SamplePrompt]:
    """The prompts of the first `count` examples."""
    prompts = []
    for name, tokens, length in found.examples[:count]:
        ids = token_ids(tokens)
        if length <= 1:
            length = max(1, min(TEXT_PROMPT_TOKENS, len(ids) // 2))
        reply = list(itertools.takewhile(lambda token: token >= 0, tokens[length:]))
        prompts.append(SamplePrompt(name, ids[:length], reply))
    return prompts
