"""The data of a run, bound to its settings: text in rows of tokens, or the rows of a GLUE task."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from lowrank_train.config.checks import world_size
from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer, data_fingerprint, training_batches, validation_batches
from lowrank_train.data.glue import GlueBatches, GlueValidation, load_rows, read_split
from lowrank_train.train.machinery import micro_batches_of

OFFSET_POSITIONS = ("roberta", "camembert", "mpnet")
"""In the names of model types whose first position has the number behind that of the pad token."""


@dataclass(frozen=True)
class RunData:
    """The data of a run; each rank opens its share."""

    training: Any  # (rank, world_size, position) -> micro-batches
    validation: Any  # (rank, world_size) -> what the head evaluates
    micro_batches: int
    facts: dict[str, str]  # fingerprints
    rows: int | None = None  # of a GLUE task
    labels: list[float] = field(default_factory=list)  # GLUE: of the training rows


def prepare_data(config: RunConfig, tokenizer: Tokenizer) -> RunData:
    """Bind what does not depend on the rank. UserError for files that are not there."""
    micro_batches = micro_batches_of(config.trainer)
    batch_size = config.trainer.batch_size
    if config.data.source == "glue":
        return _glue(config, tokenizer, micro_batches)
    return RunData(
        training=functools.partial(
            training_batches,
            config.data,
            tokenizer,
            batch_size=batch_size,
            micro_batches=micro_batches,
            seed=config.seed,
        ),
        validation=functools.partial(validation_batches, config.data, tokenizer, batch_size=batch_size),
        micro_batches=micro_batches,
        facts={"tokenizer": tokenizer.fingerprint, "data": data_fingerprint(config.data)},
    )


def _glue(config: RunConfig, tokenizer: Tokenizer, micro_batches: int) -> RunData:
    rows, evaluated, fingerprint = load_rows(config.data, tokenizer)
    assert config.data.task is not None, "config checks demand data.task"
    validation = GlueValidation(evaluated, config.trainer.batch_size)
    return RunData(
        training=functools.partial(
            GlueBatches,
            rows,
            config.data.task,
            batch_size=config.trainer.batch_size,
            micro_batches=micro_batches,
            seed=config.seed,
        ),
        validation=lambda rank, world_size: validation,
        micro_batches=micro_batches,
        facts={"tokenizer": tokenizer.fingerprint, "data": fingerprint},
        rows=len(rows),
        labels=rows.labels,
    )


def with_length(config: RunConfig) -> RunConfig:
    """The configuration with `trainer.epochs` put into steps and evaluations, and `optim.warmup_ratio` into steps."""
    trainer, optim, epochs = config.trainer, config.optim, config.trainer.epochs
    if epochs is None:
        return config
    rows = trainer.total_batch_size or trainer.batch_size * world_size(config)
    updates = math.ceil(len(read_split(config.data, "train")) / rows)
    steps = updates * epochs
    trainer = dataclasses.replace(trainer, steps=steps, eval_every_steps=updates)
    if optim.warmup_ratio is not None:
        optim = dataclasses.replace(optim, warmup_steps=math.ceil(optim.warmup_ratio * steps))
    if optim.warmup_steps > steps:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps}: is above the {steps} updates of "
            f"trainer.epochs={epochs}; shorten it, or say optim.warmup_ratio=0.06"
        )
    return dataclasses.replace(config, trainer=trainer, optim=optim)


def fit_model(config: RunConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Tell the model of a GLUE task which id is a pad. UserError where rows are longer than its positions reach."""
    if config.data.source != "glue":
        return
    own = model.config
    pad = getattr(own, "pad_token_id", None)
    positions = getattr(own, "max_position_embeddings", None)
    if positions is not None and any(name in own.model_type for name in OFFSET_POSITIONS):
        positions -= (pad or 0) + 1
    if positions is not None and 0 < positions < config.data.seq_len:
        raise UserError(
            f"data.seq_len={config.data.seq_len}: is above the {positions} positions of model.path="
            f"{config.model.path or config.model.name}; use data.seq_len={positions} or less"
        )
    if any(name in own.model_type for name in OFFSET_POSITIONS) and pad != tokenizer.pad_id:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer}: pads with id {tokenizer.pad_id}, and the model counts positions "
            f"by its own pad id {pad}; use the model's tokenizer"
        )
    own.pad_token_id = tokenizer.pad_id  # by which decoders find the last token of a row
