"""`lowrank evaluate`: perplexity of a run or an exported folder on any of the data sources."""

from __future__ import annotations

from lowrank_train.config.schema import RunConfig
from lowrank_train.data import validation_batches
from lowrank_train.evaluate.loading import Trained, open_trained
from lowrank_train.evaluate.perplexity import Evaluation, evaluate


def evaluate_command(config: RunConfig) -> int:
    """Evaluate `run=` on `data.validation` and print the result."""
    trained = open_trained(config)
    found = evaluate_trained(config, trained)
    print(f"{trained.source} on {config.data.name} ({', '.join(config.data.validation)})")
    print(f"  loss                  {found.loss:.5f} nats per token, over {found.num_targets:,} tokens")
    print(f"  perplexity            {found.perplexity:.3f}")
    print(
        f"  by the papers' formula {found.papers_loss:.5f} (perplexity {found.papers_perplexity:.3f}): batch means "
        f"divided by {found.num_batches} + 1 batches of {config.trainer.batch_size}"
    )
    return 0


def evaluate_trained(config: RunConfig, trained: Trained) -> Evaluation:
    """The evaluation that a run does, on a model that was opened."""
    return evaluate(
        trained.model,
        validation_batches(config.data, trained.tokenizer, batch_size=config.trainer.batch_size, rank=0, world_size=1),
        chunk_tokens=config.model.loss_chunk_tokens,
        device=trained.device,
        autocast=config.precision.compute == "bf16-mixed",
    )
