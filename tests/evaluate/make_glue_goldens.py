"""Writes glue_goldens.json: GLUE's metrics of random rows by scikit-learn and scipy, which are not needed afterwards.

python -m tests.evaluate.make_glue_goldens
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).with_name("glue_goldens.json")
SHAPES = [(7, 0.5), (33, 0.1), (200, 0.9), (1001, 0.5)]  # rows, share of label 1
SEEDS = range(20)


def classes(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that are wrong in 3 of 10 rows, and labels."""
    random = np.random.default_rng(seed)
    true = (random.random(count) < share).astype(np.int64)
    return np.where(random.random(count) < 0.3, 1 - true, true), true


def scores(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions without ties, and scores in steps of 0.2 with many."""
    random = np.random.default_rng(seed)
    true = np.round(random.random(count) * 25) / 5
    return true + random.standard_normal(count), true


def main() -> None:
    import scipy
    import sklearn
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    cases: list[dict[str, Any]] = []
    for count, share in SHAPES:
        for seed in SEEDS:
            predicted, true = classes(count, share, seed)
            first, second = scores(count, seed)
            values = {
                "accuracy": accuracy_score(true, predicted),
                "f1": f1_score(true, predicted, zero_division=0),
                "matthews": matthews_corrcoef(true, predicted),
                "pearson": pearsonr(first, second)[0],
                "spearman": spearmanr(first, second)[0],
            }
            # Of the inputs, so that a generator that draws other numbers one day is told from a wrong metric.
            sums = {"true": int(true.sum()), "predicted": int(predicted.sum()), "scores": math.fsum(first)}
            metrics = {name: float(value) for name, value in values.items()}
            cases.append({"rows": count, "share": share, "seed": seed, "sums": sums, "metrics": metrics})
    versions = {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__, "numpy": np.__version__}
    lines = ",\n".join(json.dumps(case) for case in cases)
    GOLDENS.write_text(f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print("written to", GOLDENS)


if __name__ == "__main__":
    main()
