"""Text in, token batches out: corpora, tokenizers, packing, and a stream that resumes exactly."""

from lowrank_train.data.stream import TrainingBatches, training_batches
from lowrank_train.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from lowrank_train.data.unigram import data_fingerprint, unigram_perplexity
from lowrank_train.data.validation import ValidationBatches, validation_batches

__all__ = [
    "Tokenizer",
    "TrainingBatches",
    "ValidationBatches",
    "data_fingerprint",
    "load_tokenizer",
    "tokenizer_of",
    "training_batches",
    "unigram_perplexity",
    "validation_batches",
]
