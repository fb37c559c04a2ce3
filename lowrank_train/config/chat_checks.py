"""Rules about data=chat: which keys of corpora mean nothing beside it, and which of its own elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lowrank_train.config.schema import DataConfig, RunConfig

OF_CHAT = ("format", "loss_on", "chat_template", "samples", "sample_tokens")
OF_CORPORA = ("shuffle_documents", "repeat", "num_workers")
"""Every epoch has an order of its own, drawn from the seed; examples are encoded once, before training."""


def chat_faults(config: RunConfig) -> Iterator[str]:
    """What contradicts the source, or is said for nothing."""
    data = config.data
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    for name in OF_CORPORA if data.source == "chat" else OF_CHAT:
        value = getattr(data, name)
        if value != defaults[name]:
            where = "means nothing with data.source=chat" if data.source == "chat" else "means something with data=chat"
            rest = "" if data.source == "chat" else f" alone, and data.source is {data.source}"
            yield f"data.{name}={str(value).lower()}: {where}{rest}; leave it out"
    if data.source != "chat":
        if data.packing == "whole":
            yield f"data.packing=whole: is for data=chat, and data.source is {data.source}; use concat or pad"
        return
    if data.packing == "concat":
        yield (
            "data.packing=concat: would cut examples apart, and part of a completion would lose its prompt; use "
            "data.packing=whole, which fills rows with whole examples, or data.packing=pad"
        )
    if config.task == "data_prepare":
        yield "data.source=chat: examples are read as they are; nothing needs to be prepared"
    if config.task == "train" and not data.validation:
        yield "data.validation: names no files; give data.validation=[FILE,...], examples that are not trained on"
