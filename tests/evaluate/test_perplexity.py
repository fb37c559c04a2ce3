"""Evaluation: weighted by tokens, the same however rows are batched or shared, and the papers' figure as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import ModelConfig
from lowrank_train.evaluate.perplexity import Evaluation, evaluate, perplexity_of
from lowrank_train.models import build_model

CPU = torch.device("cpu")
MODEL = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    built = build_model(MODEL, vocab_size=50, dtype=torch.float32, device="cpu", seed=0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8)  # far from uniform, so that rows have unequal losses
    return built


def rows(count: int = 13, length: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Rows of unequal length, padded."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        ids = torch.randint(1, 50, (length,), generator=generator)
        labels = ids.clone()
        labels[3 + number % (length - 3) :] = -100
        made.append((ids, labels))
    return made


def batched(items: list[tuple[Tensor, Tensor]], size: int) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": torch.stack([ids for ids, _ in items[first : first + size]]),
            "labels": torch.stack([labels for _, labels in items[first : first + size]]),
        }
        for first in range(0, len(items), size)
    ]


def test_loss_is_the_mean_over_tokens(model: torch.nn.Module) -> None:
    total, count = 0.0, 0
    for ids, labels in rows():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        kept = labels[1:] != -100
        total -= float(logits.log_softmax(-1)[torch.arange(11), ids[1:]][kept].sum().detach())
        count += int(kept.sum())
    found = evaluate(model, batched(rows(), 4), chunk_tokens=0, device=CPU)
    assert found.num_targets == count
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)


def test_batch_size_and_chunks_do_not_matter(model: torch.nn.Module) -> None:
    reference = evaluate(model, batched(rows(), 13), chunk_tokens=0, device=CPU)
    for size in (1, 2, 5):
        for chunk_tokens in (0, 7):
            found = evaluate(model, batched(rows(), size), chunk_tokens=chunk_tokens, device=CPU)
            assert found.loss == pytest.approx(reference.loss, rel=1e-6)
            assert found.num_targets == reference.num_targets
    assert evaluate(model, batched(rows(), 1), chunk_tokens=0, device=CPU).papers_loss != pytest.approx(
        reference.papers_loss, rel=0.05
    )


def test_the_papers_figure_divides_by_one_batch_more(model: torch.nn.Module) -> None:
    batches = batched(rows(), 4)
    means = [evaluate(model, [batch], chunk_tokens=0, device=CPU).loss for batch in batches]
    found = evaluate(model, batches, chunk_tokens=0, device=CPU)
    assert found.papers_loss == pytest.approx(sum(means) / (len(batches) + 1), rel=1e-9)
    assert found.papers_perplexity == pytest.approx(math.exp(found.papers_loss))


def test_ranks_share_the_work_and_get_one_answer(model: torch.nn.Module) -> None:
    alone = evaluate(model, batched(rows(), 3), chunk_tokens=0, device=CPU)
    vectors: list[Tensor] = []

    def remember(sums: Tensor) -> Tensor:
        vectors.append(sums)
        return sums

    for rank in range(2):
        evaluate(model, batched(rows()[rank::2], 3), chunk_tokens=0, device=CPU, sum_over_ranks=remember)
    together = evaluate(
        model, batched(rows()[0::2], 3), chunk_tokens=0, device=CPU, sum_over_ranks=lambda _: vectors[0] + vectors[1]
    )
    assert together.loss == pytest.approx(alone.loss, abs=1e-6)
    assert together.num_targets == alone.num_targets


def test_the_model_is_left_as_it_was_and_rows_without_targets_count_nothing(model: torch.nn.Module) -> None:
    empty = {"input_ids": torch.ones(1, 12, dtype=torch.long), "labels": torch.full((1, 12), -100)}
    for mode in (True, False):
        model.train(mode)
        found = evaluate(model, [*batched(rows(), 4), empty], chunk_tokens=0, device=CPU)
        assert model.training is mode
        assert found.num_batches == 4
    with pytest.raises(UserError, match=r"data\.validation"):
        evaluate(model, [empty], chunk_tokens=0, device=CPU)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_can_be_stopped_between_batches(model: torch.nn.Module) -> None:
    class Stop(Exception):
        pass

    calls = []

    def stop_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    model.train()
    with pytest.raises(Stop):
        evaluate(model, batched(rows(), 2), chunk_tokens=0, device=CPU, between_batches=stop_at_third)
    assert model.training


def test_autocast_computes_in_bf16(model: torch.nn.Module) -> None:
    exact = evaluate(model, batched(rows(), 4), chunk_tokens=0, device=CPU)
    rounded = evaluate(model, batched(rows(), 4), chunk_tokens=0, device=CPU, autocast=True)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert perplexity_of(1e4) == math.inf
    assert Evaluation(1.0, math.e, 1, 1, 0.5).papers_perplexity == pytest.approx(math.exp(0.5))
