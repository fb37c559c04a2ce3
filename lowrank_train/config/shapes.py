"""Shapes of a LLaMA's matrices from its configuration alone, before any model exists."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from lowrank_train.config.schema import RunConfig


def smallest_side(config: RunConfig, patterns: Iterable[str]) -> tuple[int, str, tuple[int, int]] | None:
    """The shortest side among the matched matrices of a LLaMA, with the matrix and its shape; None where unknown."""
    model = config.model
    if model.kind != "llama":
        return None
    hidden, inner = model.hidden_size, model.intermediate_size
    key_value = hidden // model.num_attention_heads * (model.num_key_value_heads or model.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    sides = [
        (min(shape), name, shape)
        for name, shape in shapes.items()
        if any(fnmatch.fnmatchcase(f"model.layers.0.{name}.weight", pattern) for pattern in patterns)
    ]
    return min(sides, default=None)
