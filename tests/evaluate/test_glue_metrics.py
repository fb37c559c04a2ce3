"""GLUE's metrics against scikit-learn and scipy, against torchmetrics, and against their formulas by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lowrank_train.evaluate.glue_metrics import METRICS, glue_metrics, ranks
from tests.evaluate.make_glue_goldens import GOLDENS, SEEDS, SHAPES, classes, scores

# All of these are sums and quotients of float64 numbers of size 1, over at most 1001 rows: 1e-12 is rounding.
TOLERANCE = 1e-12


@pytest.mark.parametrize(("count", "share"), SHAPES)
def test_they_equal_recorded_values_of_scikit_learn_and_scipy(count: int, share: float) -> None:
    """Of the versions that stand in the file, by make_glue_goldens.py."""
    cases = [case for case in json.loads(GOLDENS.read_text(encoding="utf-8"))["cases"] if case["rows"] == count]
    assert [case["seed"] for case in cases] == list(SEEDS)
    for case in cases:
        predicted, true = classes(count, share, case["seed"])
        given, wanted = scores(count, case["seed"])
        sums = {"true": true.sum(), "predicted": predicted.sum(), "scores": math.fsum(given)}
        assert sums == pytest.approx(case["sums"], abs=1e-9), "numpy draws other rows than those that the file is about"
        found = glue_metrics(["accuracy", "f1", "matthews"], predicted, true)
        found |= glue_metrics(["pearson", "spearman"], given, wanted)
        assert found == pytest.approx(case["metrics"], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize(("count", "share"), SHAPES)
def test_classes_equal_scikit_learn(count: int, share: float) -> None:
    reference = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for seed in SEEDS:
        predicted, true = classes(count, share, seed)
        found = glue_metrics(["accuracy", "f1", "matthews"], predicted, true)
        assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, predicted), abs=TOLERANCE)
        assert found["f1"] == pytest.approx(reference.f1_score(true, predicted, zero_division=0), abs=TOLERANCE)
        assert found["matthews"] == pytest.approx(reference.matthews_corrcoef(true, predicted), abs=TOLERANCE)


@pytest.mark.parametrize(("count", "share"), SHAPES)
def test_scores_equal_scipy(count: int, share: float) -> None:
    reference = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for seed in SEEDS:
        predicted, true = scores(count, seed)
        found = glue_metrics(["pearson", "spearman"], predicted, true)
        assert found["pearson"] == pytest.approx(reference.pearsonr(predicted, true)[0], abs=TOLERANCE)
        assert found["spearman"] == pytest.approx(reference.spearmanr(predicted, true)[0], abs=TOLERANCE)


@pytest.mark.parametrize(("count", "share"), SHAPES)
def test_all_equal_torchmetrics(count: int, share: float) -> None:
    """It comes with Lightning. Its F1 and Matthews are float32 inside: 1e-6 is rounding of the quotient."""
    reference = pytest.importorskip("torchmetrics.functional", reason="torchmetrics is not installed")
    for seed in range(5):
        predicted, true = map(torch.from_numpy, classes(count, share, seed))
        found = glue_metrics(["accuracy", "f1", "matthews"], predicted.numpy(), true.numpy())
        assert found["accuracy"] == pytest.approx(float(reference.accuracy(predicted, true, task="binary")), abs=1e-6)
        assert found["f1"] == pytest.approx(float(reference.f1_score(predicted, true, task="binary")), abs=1e-6)
        theirs = float(reference.matthews_corrcoef(predicted, true, task="binary"))
        assert found["matthews"] == pytest.approx(theirs, abs=1e-6)
        predicted, true = map(torch.from_numpy, scores(count, seed))
        found = glue_metrics(["pearson", "spearman"], predicted.numpy(), true.numpy())
        assert found["pearson"] == pytest.approx(float(reference.pearson_corrcoef(predicted, true)), abs=1e-9)
        # theirs adds 1.2e-7 to the product of standard deviations
        assert found["spearman"] == pytest.approx(float(reference.spearman_corrcoef(predicted, true)), abs=1e-6)


def test_by_hand() -> None:
    """8 rows: TP 3, TN 2, FP 1, FN 2."""
    true = np.array([1, 1, 1, 1, 1, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    found = glue_metrics(["accuracy", "f1", "matthews"], predicted, true)
    assert found["accuracy"] == 5 / 8
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2), abs=TOLERANCE)
    assert found["matthews"] == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4), abs=TOLERANCE)
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 2.0, 4.0, 3.0])
    # means 2.75 and 2.75: sum of products 2.75, of squares 8.75 and 2.75
    assert METRICS["pearson"](x, y) == pytest.approx(2.75 / math.sqrt(8.75 * 2.75), abs=TOLERANCE)
    assert ranks(y).tolist() == [1.5, 1.5, 4.0, 3.0]
    # ranks 1 2 3 4 and 1.5 1.5 4 3: sum of products 3.5, of squares 5 and 4.5
    assert METRICS["spearman"](x, y) == pytest.approx(3.5 / math.sqrt(5 * 4.5), abs=TOLERANCE)


def test_corner_cases_are_those_of_scikit_learn_and_scipy() -> None:
    """All of one class: F1 and Matthews 0; a constant, or one row: no correlation."""
    zeros, ones = np.zeros(5, dtype=int), np.ones(5, dtype=int)
    assert glue_metrics(["accuracy", "f1", "matthews"], zeros, zeros) == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0}
    assert glue_metrics(["f1", "matthews"], ones, np.array([0, 1, 1, 0, 1])) == {"f1": 0.75, "matthews": 0.0}
    constant, moving = np.full(6, 0.1), np.arange(6.0)
    for name in ("pearson", "spearman"):
        assert math.isnan(METRICS[name](constant, moving)) and math.isnan(METRICS[name](moving, constant))
        assert math.isnan(METRICS[name](moving[:1], moving[:1]))
        assert METRICS[name](moving, 3 - moving) == pytest.approx(-1, abs=TOLERANCE)


def test_single_precision_predictions_are_averaged_in_double() -> None:
    """Scores of a model are float32: a mean of 100,000 of them near 1000 in float32 would be off by 1e-3."""
    random = np.random.default_rng(0)
    noise = random.standard_normal(100_000)
    predicted = (1000 + noise).astype(np.float32)
    exact = float(np.corrcoef(predicted.astype(np.float64), noise)[0, 1])
    assert METRICS["pearson"](predicted, noise) == pytest.approx(exact, abs=1e-12)
