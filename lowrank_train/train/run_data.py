"""The data of a run, bound to its settings: text in rows of tokens, or the rows of a GLUE task."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from lowrank_train.config.checks import world_size
from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer, data_fingerprint, training_batches, unigram_perplexity, validation_batches
from lowrank_train.data.glue import GlueBatches, GlueValidation, load_rows, read_split
from lowrank_train.evaluate.samples import Sampler
from lowrank_train.models import OFFSET_POSITIONS, check_rows
from lowrank_train.train.machinery import micro_batches_of


@dataclass(frozen=True)
class RunData:
    """The data of a run; each rank opens its share."""

    training: Any  # (rank, world_size, position) -> micro-batches
    validation: Any  # (rank, world_size) -> what the head evaluates
    micro_batches: int
    facts: dict[str, str]  # fingerprints
    rows: int | None = None  # of a GLUE task
    labels: list[float] = field(default_factory=list)  # GLUE: of the training rows
    unigram: Callable[[], float] | None = None  # perplexity by the frequency of tokens alone
    remarks: tuple[str, ...] = ()  # on what was read, for the user
    largest_id: int | None = None  # chat: of all tokens, those of the chat template among them
    sampler: Sampler | None = None  # chat: of validation prompts


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
        unigram=functools.partial(unigram_perplexity, config.data, tokenizer),
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


def with_length(config: RunConfig, num_rows: int | None = None) -> RunConfig:
    """The configuration with `trainer.epochs` put into steps and evaluations, and `optim.warmup_ratio` into steps.

    `num_rows`: rows of an epoch; None: those of the GLUE task.
    """
    trainer, optim, epochs = config.trainer, config.optim, config.trainer.epochs
    if epochs is None:
        return config
    rows = trainer.total_batch_size or trainer.batch_size * world_size(config)
    updates = math.ceil((len(read_split(config.data, "train")) if num_rows is None else num_rows) / rows)
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


def fit_model(config: RunConfig, model: PreTrainedModel, tokenizer: Tokenizer, largest_id: int | None = None) -> None:
    """Tell the model of a GLUE task which id is a pad.

    UserError where rows are longer than the model's positions reach, where its attention cannot be kept within a
    document, or where an id of the data, at most `largest_id`, has no row in its embedding.
    """
    own = model.config
    check_rows(model, config.model, config.data)
    if largest_id is not None and largest_id >= own.vocab_size:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer}: its special tokens have ids up to {largest_id}, and model "
            f"{config.model.name} has an embedding of {own.vocab_size} rows; use the model's tokenizer, or another "
            "data.chat_template"
        )
    if config.data.source != "glue":
        return
    pad = getattr(own, "pad_token_id", None)
    if any(name in own.model_type for name in OFFSET_POSITIONS) and pad != tokenizer.pad_id:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer}: pads with id {tokenizer.pad_id}, and the model counts positions "
            f"by its own pad id {pad}; use the model's tokenizer"
        )
    own.pad_token_id = tokenizer.pad_id  # by which decoders find the last token of a row
