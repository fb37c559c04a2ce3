"""The data of a run on instructions or chats: examples read before anything else, bound to the run's settings."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer, data_fingerprint, tokenizer_of
from lowrank_train.data.chat import (
    ExampleBatches,
    Examples,
    ExampleValidation,
    RowTable,
    open_examples,
    rows_identity,
    sample_prompts,
    template_text,
    unigram_perplexity_of,
)
from lowrank_train.evaluate.samples import Sampler
from lowrank_train.train.machinery import micro_batches_of
from lowrank_train.train.run_data import RunData


@dataclass(frozen=True)
class ChatData:
    """What was read of data=chat, once for the whole run."""

    tokenizer: Tokenizer
    training: Examples
    validation: Examples
    rows: RowTable  # of the training examples


def read_chat(config: RunConfig) -> tuple[RunConfig, ChatData | None]:
    """The examples, and the configuration with the text of its chat template and with `generate.chat` decided.

    None for other sources. UserError for rows that are no examples, in either split.
    """
    if config.data.source != "chat":
        return config, None
    data = config.data
    if data.chat_template is not None:  # its text, so that the run needs no file later
        data = dataclasses.replace(data, chat_template=template_text(data.chat_template))
    tokenizer = tokenizer_of(dataclasses.replace(config, data=data))
    training, validation = (open_examples(data, split, tokenizer) for split in ("train", "validation"))
    generate = config.generate
    if generate.chat is None:
        generate = dataclasses.replace(generate, chat=training.conversational)
    chat = ChatData(tokenizer, training, validation, RowTable(training.examples, data, tokenizer))
    return dataclasses.replace(config, data=data, generate=generate), chat


def prepare_chat(config: RunConfig, chat: ChatData) -> RunData:
    """Bind what does not depend on the rank."""
    batch_size, micro_batches = config.trainer.batch_size, micro_batches_of(config.trainer)
    return RunData(
        training=functools.partial(
            ExampleBatches,
            chat.rows,
            identity=rows_identity(chat.training, config.data),
            batch_size=batch_size,
            micro_batches=micro_batches,
            seed=config.seed,
        ),
        validation=functools.partial(ExampleValidation, chat.validation, config.data, chat.tokenizer, batch_size),
        micro_batches=micro_batches,
        facts={"tokenizer": chat.tokenizer.fingerprint, "data": data_fingerprint(config.data)},
        unigram=functools.partial(unigram_perplexity_of, chat.training, chat.validation, chat.tokenizer.vocab_size),
        remarks=(
            f"train: {chat.training.sentence()}",
            f"validation: {chat.validation.sentence()}",
            f"rows: {len(chat.rows):,} in an epoch, "
            f"{chat.training.num_tokens / (len(chat.rows) * config.data.seq_len):.0%} of {config.data.seq_len} tokens",
        ),
        largest_id=max(chat.training.largest_id, chat.validation.largest_id),
        sampler=Sampler(sample_prompts(chat.validation, config.data.samples), chat.tokenizer, config.data.sample_tokens)
        if config.data.samples
        else None,
    )
