"""What a strategy's state saves against AdamW, in full and in 8 bits, and advice where it saves nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lowrank_train.nn.reparam import ReparamLinear
from lowrank_train.optim.activity import is_trainable
from lowrank_train.report.banner import Assigned
from lowrank_train.report.units import format_bytes

EIGHT_BIT_BLOCK = 256  # numbers that share a float32 scale in bitsandbytes' state
EIGHT_BIT_MIN_ELEMENTS = 4096  # bitsandbytes keeps smaller tensors in 32 bits


@dataclass(frozen=True)
class Saving:
    """Bytes of state for some tensors: with the strategy, with AdamW, and with AdamW in 8 bits."""

    strategy_bytes: int
    adamw_bytes: int
    adamw_8bit_bytes: int


def saving(rows: Iterable[Assigned], element_bytes: int, plain: Iterable[tuple[int, ...]] | None = None) -> Saving:
    """What the state of `rows` takes, and what that of AdamW would take; `element_bytes`: of a number of its state.

    What is kept to make up for the rounding of weights is left out: AdamW would keep as much.
    `plain`: the shapes that AdamW would train; None: those of `rows`.
    """
    rows = list(rows)
    ours, full, eight_bit = sum(row.state_bytes - row.residue_bytes for row in rows), 0, 0
    for shape in [row.shape for row in rows] if plain is None else plain:
        elements = math.prod(shape)
        full += 2 * element_bytes * elements
        coded = elements + 4 * math.ceil(elements / EIGHT_BIT_BLOCK)
        eight_bit += 2 * (coded if elements >= EIGHT_BIT_MIN_ELEMENTS else 4 * elements)
    return Saving(ours, full, eight_bit)


def advice(strategy: str, rows: Iterable[Assigned], element_bytes: int) -> str:
    """What to tell a user whose strategy keeps as much state for its matrices as AdamW would; nothing to all others."""
    projected = [row for row in rows if row.role == "projected"]
    found = saving(projected, element_bytes)
    if not projected or found.strategy_bytes < found.adamw_bytes:
        return ""
    highest = max(row.rank or 0 for row in projected)
    return (
        f"strategy {strategy} saves nothing here: it keeps {format_bytes(found.strategy_bytes)} of state for its "
        f"{len(projected)} matrices, AdamW would keep {format_bytes(found.adamw_bytes)}, and 8-bit AdamW "
        f"{format_bytes(found.adamw_8bit_bytes)}. Lower strategy.subspace.rank, which is {highest}, or take "
        "strategy=full"
    )


def advice_on_layers(strategy: str, layers: Iterable[ReparamLinear]) -> str:
    """What to tell a user whose low-rank layers train as many numbers as the matrices they stand for; else nothing."""
    ranked = [layer for layer in layers if getattr(layer.weights, "rank", None)]
    trained = sum(
        param.numel()
        for layer in ranked
        for name, param in layer.named_parameters()
        if name != "bias" and is_trainable(param)
    )
    dense = sum(layer.in_features * layer.out_features for layer in ranked)
    if not ranked or trained < dense:
        return ""
    highest = max(getattr(layer.weights, "rank", 0) for layer in ranked)
    return (
        f"strategy {strategy} saves nothing here: its {len(ranked)} layers train {trained:,} numbers in place of "
        f"{dense:,}. Lower strategy.weights.rank, which is {highest}, or take strategy=full"
    )
