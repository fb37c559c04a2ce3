"""Embeddings and heads: which they are, and those that a pattern of a strategy takes in by accident."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import nn


def tables(model: nn.Module) -> dict[str, str]:
    """Parameter name -> `embedding` or `head`, of the tensors that have one row for each token."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is output:
            found[f"{name}.weight"] = "head" if module is output else "embedding"
    return found


def row_head(model: nn.Module) -> set[str]:
    """Names of the parameters between the hidden states and the labels or score of a row; empty for other models.

    They are what is outside of the body, and the body's pooler: RoBERTa has in its head what BERT calls a pooler.
    """
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if body is None or body is model or getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return set()
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if not name.startswith(f"{prefix}.") or name.startswith(f"{prefix}.pooler.")}


def taken_by_accident(model: nn.Module, patterns: Sequence[str], chosen: Iterable[str]) -> Iterator[str]:
    """A fault for every embedding or head that is selected although no pattern names its module."""
    kinds = tables(model)
    for name in sorted(set(chosen) & set(kinds)):
        module = name.split(".")[-2]
        if not any(module in pattern for pattern in patterns):
            pattern = next(pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern))
            yield (
                f"strategy.select pattern {pattern!r} takes in {name}, the {kinds[name]}, which the papers leave to "
                "strategy.rest; give narrower patterns, such as '*.self_attn.*.weight' and '*.mlp.*.weight', or select "
                f"it on purpose with '*{module}*'"
            )
