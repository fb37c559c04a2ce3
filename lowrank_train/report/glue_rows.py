"""How well a run did on its GLUE task, in words, from result.json alone."""

from __future__ import annotations

from typing import Any

NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}


def is_glue(result: dict[str, Any]) -> bool:
    """Whether this is the result of a GLUE task, not of text."""
    return "metrics" in result


def glue_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of the lines that stand where a run on text has its perplexities."""
    rows = [
        ("last evaluation", f"{metrics_sentence(result['metrics'])}  ({result['val_rows']:,} rows)"),
        ("best evaluation", f"{metrics_sentence(result['best_metrics'])}  ({best_place(result)})"),
    ]
    commonest = result["commonest_label_metrics"]
    if commonest is not None:
        rows.append(("commonest label", f"{metrics_sentence(commonest)}  (given to every row)"))
    rows.append(("validation loss", f"{result['val_loss']:.4f}"))
    return rows


def metrics_sentence(metrics: dict[str, dict[str, float | None]]) -> str:
    """`accuracy 88.24, F1 91.60`, in percent as GLUE's tables are; each split by its name where there are several."""
    parts = []
    for split, values in metrics.items():
        part = split.removeprefix("validation").lstrip("_")
        told = ", ".join(f"{NAMES[name]} {in_percent(value)}" for name, value in values.items())
        parts.append(f"{part} {told}" if part else told)
    return "; ".join(parts)


def in_percent(value: float | None) -> str:
    """With two decimals; a dash for what is not defined."""
    return "-" if value is None else f"{100 * value:.2f}"


def best_place(result: dict[str, Any]) -> str:
    """When the best evaluation was, and by what it is the best."""
    split, metric = result["best_by"]
    part = split.removeprefix("validation").lstrip("_")
    by = f"by {part + ' ' if part else ''}{NAMES[metric]}, the first of equals"
    updates = result["updates_per_epoch"]
    if updates:
        return f"epoch {result['best_step'] / updates:g} of {result['steps'] / updates:g}, {by}"
    return f"update {result['best_step']:,} of {result['steps']:,}, {by}"
