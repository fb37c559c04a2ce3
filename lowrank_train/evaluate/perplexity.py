"""Token-weighted loss and perplexity, independent of batch size and ranks, and the published family's figure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_train.config.errors import UserError
from lowrank_train.models import causal_loss


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; losses are in nats per target token."""

    loss: float  # sum of -log p over all targets / number of targets
    perplexity: float
    num_targets: int
    num_batches: int
    papers_loss: float
    """Sum of batch means / (batches + 1), as GaLore's `evaluate_model` and its descendants compute it: their count
    starts at 1, so it is too low by a share of 1 / (batches + 1) and moves with the batch size. For comparison only."""

    @property
    def papers_perplexity(self) -> float:
        return perplexity_of(self.papers_loss)


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    chunk_tokens: int,
    device: torch.device,
    autocast: bool = False,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    between_batches: Callable[[], None] | None = None,
) -> Evaluation:
    """Loss of `model` on finite `batches`, each with "input_ids" and "labels" of shape (rows, seq_len).

    Sums are kept in float64, so that the result does not depend on how rows were grouped beyond rounding. `autocast`
    computes in bf16 as bf16-mixed training does. `sum_over_ranks` adds a float64 vector over processes;
    `between_batches` is called before each batch and may raise to stop. The model's training mode is restored.
    UserError when there is no target at all.
    """
    was_training = model.training
    model.eval()
    context = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    loss_sum = sum_of_means = 0.0
    num_targets = num_batches = 0
    try:
        with torch.no_grad(), context:
            for batch in batches:
                if between_batches is not None:
                    between_batches()
                on_device = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                batch_sum, batch_targets = causal_loss(model, on_device, chunk_tokens=chunk_tokens)
                if batch_targets == 0:
                    continue
                loss_sum += float(batch_sum)
                sum_of_means += float(batch_sum) / batch_targets
                num_targets += batch_targets
                num_batches += 1
    finally:
        model.train(was_training)
    sums = torch.tensor([loss_sum, sum_of_means, num_targets, num_batches, 1], dtype=torch.float64)
    if sum_over_ranks is not None:
        sums = sum_over_ranks(sums)
    loss_sum, sum_of_means, targets, count, ranks = sums.tolist()
    if targets == 0:
        raise UserError("data.validation has no token to predict; give it at least two tokens of text")
    loss = loss_sum / targets
    return Evaluation(
        loss=loss,
        perplexity=perplexity_of(loss),
        num_targets=int(targets),
        num_batches=int(count),
        papers_loss=sum_of_means / (count + ranks),  # each rank of theirs starts its count at 1
    )


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
