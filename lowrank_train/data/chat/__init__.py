"""Instructions and chats for fine-tuning: rows of JSON lines to examples that say which tokens are to be predicted."""

from lowrank_train.data.chat.batches import (
    ExampleBatches,
    ExampleValidation,
    RowTable,
    rows_identity,
    unigram_perplexity_of,
)
from lowrank_train.data.chat.prompts import SamplePrompt, sample_prompts
from lowrank_train.data.chat.source import Examples, open_examples
from lowrank_train.data.chat.template import ChatTemplate, template_text

__all__ = [
    "ChatTemplate",
    "ExampleBatches",
    "ExampleValidation",
    "Examples",
    "RowTable",
    "SamplePrompt",
    "open_examples",
    "rows_identity",
    "sample_prompts",
    "template_text",
    "unigram_perplexity_of",
]
