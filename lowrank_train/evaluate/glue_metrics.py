"""The official metrics of GLUE, in float64, with the corner cases of scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]

# torchmetrics has these too, but works in the dtype of its input and gives other values where a rate is 0 / 0.


def accuracy(predicted: Values, true: Values) -> float:
    """Share of rows whose label is predicted."""
    return float(np.mean(predicted == true))


def f1(predicted: Values, true: Values) -> float:
    """2 TP / (2 TP + FP + FN) of label 1; 0 where there is none, neither true nor predicted."""
    hits = float(np.sum((predicted == 1) & (true == 1)))
    named = float(np.sum(predicted == 1) + np.sum(true == 1))
    return 2 * hits / named if named else 0.0


def matthews(predicted: Values, true: Values) -> float:
    """(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)); 0 where a factor is."""
    tp, tn = (float(np.sum((predicted == label) & (true == label))) for label in (1, 0))
    fp, fn = (float(np.sum((predicted == label) & (true == 1 - label))) for label in (1, 0))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return float((tp * tn - fp * fn) / np.sqrt(product)) if product else 0.0


def pearson(predicted: Values, true: Values) -> float:
    """Covariance over the product of standard deviations; NaN where one of them is 0, and for fewer than two rows."""
    if len(true) < 2:
        return float("nan")
    x, y = (values.astype(np.float64) - np.mean(values, dtype=np.float64) for values in (predicted, true))
    lengths = float(np.sqrt(x @ x) * np.sqrt(y @ y))
    constant = np.ptp(predicted) == 0 or np.ptp(true) == 0  # rounding of the mean would hide it
    return float("nan") if constant or not lengths else float(np.clip(x @ y / lengths, -1, 1))


def spearman(predicted: Values, true: Values) -> float:
    """Pearson's correlation of ranks; equal values share the mean of their ranks."""
    return pearson(ranks(predicted), ranks(true))


def ranks(values: Values) -> Values:
    """Ranks from 1, the mean of theirs for equal values: shape (rows,) float64."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    means: Values = (last - (count - 1) / 2).astype(np.float64)
    ranked: Values = means[place]
    return ranked


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def glue_metrics(names: Sequence[str], predicted: Values, true: Values) -> dict[str, float]:
    """The named metrics of predictions: labels by their number, or scores."""
    return {name: METRICS[name](np.asarray(predicted), np.asarray(true)) for name in names}
