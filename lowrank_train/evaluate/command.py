"""`lowrank evaluate`: perplexity of a run or an exported folder on any text, or the metrics of a GLUE task."""

from __future__ import annotations

import time

from lowrank_train.config.schema import RunConfig
from lowrank_train.data import validation_batches
from lowrank_train.data.glue import GlueValidation, encoded_rows, read_split, splits_of
from lowrank_train.evaluate.heads import head_of
from lowrank_train.evaluate.loading import Trained, open_trained
from lowrank_train.evaluate.perplexity import Evaluation, evaluate
from lowrank_train.models import check_rows


def evaluate_command(config: RunConfig) -> int:
    """Evaluate `run=` on `data.validation` and print the result."""
    trained = open_trained(config)
    if config.data.source == "glue":
        return evaluate_glue(config, trained)
    found = evaluate_trained(config, trained)
    print(f"{trained.source} on {config.data.name} ({', '.join(config.data.validation)})")
    print(f"  loss                  {found.loss:.5f} nats per token, over {found.num_targets:,} tokens")
    print(f"  perplexity            {found.perplexity:.3f}")
    print(
        f"  by the papers' formula {found.papers_loss:.5f} (perplexity {found.papers_perplexity:.3f}): batch means "
        f"divided by {found.num_batches} + 1 batches of {config.trainer.batch_size}"
    )
    return 0


def evaluate_glue(config: RunConfig, trained: Trained) -> int:
    """Print the official metrics of a GLUE task."""
    head, began_sec = head_of(config), time.perf_counter()
    rows = {
        split: encoded_rows(config.data, read_split(config.data, split), trained.tokenizer, split)
        for split in splits_of(config.data)
    }
    found = head.evaluate(
        trained.model,
        GlueValidation(rows, config.trainer.batch_size),
        device=trained.device,
        autocast=config.precision.compute == "bf16-mixed",
    )
    print(f"{trained.source} on {config.data.task}")
    print(f"  {head.sentence(found, time.perf_counter() - began_sec)}")
    return 0


def evaluate_trained(config: RunConfig, trained: Trained) -> Evaluation:
    """The evaluation that a run does, on a model that was opened."""
    check_rows(trained.model, config.model, config.data)
    return evaluate(
        trained.model,
        validation_batches(config.data, trained.tokenizer, batch_size=config.trainer.batch_size, rank=0, world_size=1),
        chunk_tokens=config.model.loss_chunk_tokens,
        device=trained.device,
        autocast=config.precision.compute == "bf16-mixed",
    )
