"""What a run asks of its model: the loss of a batch, and what an evaluation finds; for text, and for GLUE's tasks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_train.config.schema import RunConfig
from lowrank_train.data.glue import TASKS, GlueTask, GlueValidation
from lowrank_train.data.glue.encoding import NO_LABEL
from lowrank_train.evaluate.glue_metrics import glue_metrics
from lowrank_train.evaluate.perplexity import evaluate
from lowrank_train.models import causal_loss


class Head(Protocol):
    """The only thing about a task that training knows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What an evaluation adds to metrics.csv beside val/loss."""

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum of the losses over the targets of a batch, and their number."""

    def evaluate(
        self,
        model: nn.Module,
        validation: Any,
        *,
        device: torch.device,
        autocast: bool,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        between_batches: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Loss, num_targets and what else is known of the validation data, as it is kept in a checkpoint."""

    def few(self, validation: Any, rows: int, ranks: int) -> list[dict[str, Any]]:
        """Batches of this rank's share of the first rows of what `evaluate` takes, for a loss that is asked for often;
        on the CPU, tensors alone."""

    def row(self, found: dict[str, Any]) -> dict[str, Any]:
        """An evaluation as cells of metrics.csv."""

    def sentence(self, found: dict[str, Any], seconds: float) -> str:
        """An evaluation in words, and how long it took."""

    def score(self, found: dict[str, Any]) -> float:
        """By which the best evaluation of a run is chosen, the higher the better."""


class CausalHead:
    """The next token: -log p of every target, in nats."""

    columns: tuple[str, ...] = ("val/perplexity",)

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        return causal_loss(model, batch, chunk_tokens=self.chunk_tokens)

    def evaluate(self, model: nn.Module, validation: Iterable[dict[str, Any]], **how: Any) -> dict[str, Any]:
        return asdict(evaluate(model, validation, chunk_tokens=self.chunk_tokens, **how))

    def few(self, validation: Iterable[dict[str, Any]], rows: int, ranks: int) -> list[dict[str, Any]]:
        taken, left = [], math.ceil(rows / ranks)
        for batch in validation:
            taken.append({key: value[:left] for key, value in batch.items() if isinstance(value, Tensor)})
            left -= len(taken[-1]["labels"])
            if left <= 0:
                break
        return taken

    def row(self, found: dict[str, Any]) -> dict[str, Any]:
        return {"val/loss": found["loss"], "val/perplexity": found["perplexity"]}

    def sentence(self, found: dict[str, Any], seconds: float) -> str:
        return (
            f"val_loss: {found['loss']:.4f}  val_perplexity: {found['perplexity']:.2f}  "
            f"({found['num_targets']:,} tokens in {seconds:.1f} s)"
        )

    def score(self, found: dict[str, Any]) -> float:
        return -float(found["loss"]) if math.isfinite(found["loss"]) else -math.inf


@dataclass(frozen=True)
class GlueHead:
    """A label, or a score, for a text or a pair: cross-entropy in nats, or (score - true score)^2."""

    task: GlueTask

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.column(split, name) for split in self.task.validation for name in self.task.metrics)

    def column(self, split: str, metric: str) -> str:
        """`val/accuracy`, or `val/matched/accuracy` where a task has several splits."""
        part = split.removeprefix("validation").lstrip("_")
        return f"val/{part}/{metric}" if part else f"val/{metric}"

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        labels = batch["labels"]
        logits = self.outputs(model, batch)
        if self.task.labels:
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=NO_LABEL)
        else:
            wanted = labels != NO_LABEL
            loss = ((logits[:, 0] - labels).square() * wanted).sum()
        return loss, len(labels)

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(rows, labels) logits, or (rows, 1) scores, in float32 or wider."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        logits: Tensor = model(**{name: batch[name] for name in names if name in batch}).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def evaluate(
        self,
        model: nn.Module,
        validation: GlueValidation,
        *,
        device: torch.device,
        autocast: bool,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        between_batches: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """{"loss", "num_targets", "metrics": {split: {name: value}}}; the loss is that of the first split.

        `sum_over_ranks` is not needed: every rank evaluates all rows. A metric that is not defined is None.
        """
        was_training = model.training
        model.eval()
        context = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
        losses, metrics = [], {}
        try:
            with torch.no_grad(), context:
                for split, rows in validation.splits.items():
                    outputs, labels = [], []
                    for batch in validation.batches(split):
                        if between_batches is not None:
                            between_batches()
                        on_device = {key: v.to(device) for key, v in batch.items() if isinstance(v, Tensor)}
                        outputs.append(self.outputs(model, on_device).double().cpu())
                        labels.append(batch["labels"])
                    logits, true = torch.cat(outputs), torch.cat(labels)
                    losses.append(self._mean_loss(logits, true))
                    predicted = logits.argmax(1) if self.task.labels else logits[:, 0]
                    found = glue_metrics(self.task.metrics, predicted.numpy(), true.numpy())
                    metrics[split] = {name: value if math.isfinite(value) else None for name, value in found.items()}
                    assert len(true) == len(rows)
        finally:
            model.train(was_training)
        first = len(next(iter(validation.splits.values())))
        return {"loss": losses[0], "num_targets": first, "metrics": metrics}

    def few(self, validation: GlueValidation, rows: int, ranks: int) -> list[dict[str, Any]]:
        """Every rank has all of them."""
        first = next(iter(validation.splits.values()))
        batch = first.batch(list(range(min(rows, len(first)))))
        return [{key: value for key, value in batch.items() if isinstance(value, Tensor)}]

    def _mean_loss(self, logits: Tensor, true: Tensor) -> float:
        if self.task.labels:
            return float(nn.functional.cross_entropy(logits, true))
        return float((logits[:, 0] - true).square().mean())

    def row(self, found: dict[str, Any]) -> dict[str, Any]:
        cells = {
            self.column(split, name): "" if value is None else value
            for split, values in found["metrics"].items()
            for name, value in values.items()
        }
        return {"val/loss": found["loss"], **cells}

    def sentence(self, found: dict[str, Any], seconds: float) -> str:
        told = "  ".join(
            f"{self.column(split, name).removeprefix('val/')}: {'not defined' if value is None else f'{value:.4f}'}"
            for split, values in found["metrics"].items()
            for name, value in values.items()
        )
        return f"val_loss: {found['loss']:.4f}  {told}  ({found['num_targets']:,} rows in {seconds:.1f} s)"

    def score(self, found: dict[str, Any]) -> float:
        split, metric = self.task.best_by
        value = found["metrics"][split][metric]
        return -math.inf if value is None else float(value)

    def of_the_commonest_label(self, training: list[float], validation: GlueValidation) -> dict[str, Any] | None:
        """Metrics of always giving the label that training rows have most often; None for scores."""
        if not self.task.labels:
            return None
        values, counts = np.unique(np.asarray(training), return_counts=True)
        commonest = values[counts.argmax()]
        return {
            split: glue_metrics(self.task.metrics, np.full(len(rows), commonest), np.asarray(rows.labels))
            for split, rows in validation.splits.items()
        }


def head_of(config: RunConfig) -> Head:
    """The head that the run's data ask for."""
    if config.data.source == "glue":
        assert config.data.task is not None, "config checks demand data.task"
        return GlueHead(TASKS[config.data.task])
    return CausalHead(config.model.loss_chunk_tokens)
