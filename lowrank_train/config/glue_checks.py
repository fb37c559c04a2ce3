"""Rules about data=glue: what it needs, and which keys mean nothing beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lowrank_train.config.schema import DataConfig, RunConfig

OF_TEXT = ("text_key", "packing", "mask_documents", "shuffle_documents", "repeat", "num_workers", "validation_tokens")
"""Keys of corpora: the rows of a task are drawn in a new order in every epoch, and all are evaluated."""

TASKS_WITHOUT_GLUE = {
    "generate": "a model of GLUE tasks gives labels, no text; evaluate it with `lowrank evaluate run=FOLDER`",
    "data_prepare": "the rows of a task are read as they are; nothing needs to be prepared",
}


def glue_faults(config: RunConfig) -> Iterator[str]:
    """What is missing, or said for nothing."""
    data, trainer, optim = config.data, config.trainer, config.optim
    if optim.warmup_ratio is not None and trainer.epochs is None:
        yield (
            f"optim.warmup_ratio={optim.warmup_ratio}: is a share of the updates of trainer.epochs, which is not set; "
            "give trainer.epochs, or optim.warmup_steps"
        )
    if config.task == "train" and optim.warmup_ratio is not None and optim.warmup_steps:  # a finished run has both
        yield (
            f"optim.warmup_ratio={optim.warmup_ratio}: stands in place of optim.warmup_steps={optim.warmup_steps}; "
            "give one of them"
        )
    if data.source != "glue":
        yield from _without_glue(config)
        return
    if data.task is None:
        yield "data.task: data=glue needs the task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli"
    if data.train_rows is not None and data.train_rows < 1:
        yield f"data.train_rows={data.train_rows}: must be at least 1; null takes all rows"
    if config.task in TASKS_WITHOUT_GLUE:
        yield f"data.source=glue: {TASKS_WITHOUT_GLUE[config.task]}"
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    for name in OF_TEXT:
        value = getattr(data, name)
        if value != defaults[name]:
            yield f"data.{name}={str(value).lower()}: means nothing with data.source=glue; leave it out"
    if config.rehearse is True:
        yield "rehearse=true: is for long runs on text; with data.source=glue leave it out"


def _without_glue(config: RunConfig) -> Iterator[str]:
    for key, value in (
        ("data.task", config.data.task),
        ("data.folder", config.data.folder),
        ("data.train_rows", config.data.train_rows),
    ):
        if value is not None:
            yield f"{key}={value}: means something with data=glue alone, and data.source is {config.data.source}"
    if config.trainer.epochs is not None and config.data.source != "chat":
        yield (
            f"trainer.epochs={config.trainer.epochs}: means something with data=glue and data=chat alone, and "
            f"data.source is {config.data.source}; give trainer.steps"
        )
