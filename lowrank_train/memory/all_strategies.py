"""`lowrank plan strategy=all`: what every strategy would hold of one model, and which of them fit the card."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_train.config import compose
from lowrank_train.config.errors import UserError
from lowrank_train.config.paths import group_choices
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.cards import GB, Card, chosen_card
from lowrank_train.memory.plan import Plan, planned


@dataclass(frozen=True)
class Row:
    """One strategy: its plan, or why the model does not take it under these words."""

    strategy: str
    plan: Plan | None
    refused: str = ""


def plan_all(words: Sequence[str]) -> int:
    """Print one row a strategy, the smallest peak first; `words` are those of the command line without strategy=all."""
    configs: dict[str, RunConfig] = {}
    rows = []
    for strategy in group_choices()["strategy"]:
        try:  # the recipe's own strategy gives way, as it does on any command line
            configs[strategy] = compose([*words, f"strategy={strategy}", "task=plan"])
        except UserError as error:
            rows.append(Row(strategy, None, error.faults[0]))
    if not configs:  # a fault that has nothing to do with the strategy
        raise UserError(rows[0].refused)
    any_config = next(iter(configs.values()))
    card = chosen_card(any_config.card, any_config.budget_gb)
    for number, (strategy, config) in enumerate(configs.items(), 1):
        print(f"{number}/{len(configs)} {strategy}", file=sys.stderr, flush=True)
        try:
            rows.append(Row(strategy, planned(config, card)))
        except UserError as error:
            rows.append(Row(strategy, None, error.faults[0]))
    rows.sort(key=lambda row: (row.plan is None, row.plan.peak_bytes if row.plan else 0, row.strategy))
    if any_config.format == "json":
        print(json.dumps([as_json(row) for row in rows], indent=2))
    else:
        print("\n".join(table(rows, card)))
    return 0


def parts_of(plan: Plan) -> dict[str, int]:
    """Bytes of weights with buffers, gradients, state, and of bases apart from it."""
    kept = plan.bytes
    state = {kind: count for kind, count in kept.items() if kind.startswith("state.")}
    bases = sum(count for kind, count in state.items() if kind.startswith("state.basis"))
    return {
        "weights": kept["trained_weights"] + kept["frozen_weights"] + kept["buffers"],
        "gradients": kept["gradients"],
        "state": sum(state.values()) - bases,
        "bases": bases,
        "persistent": plan.persistent_bytes,
        "peak": plan.peak_bytes,
    }


def as_json(row: Row) -> dict[str, Any]:
    """The parts by name, the whole plan beside them; or the refusal."""
    if row.plan is None:
        return {"strategy": row.strategy, "refused": row.refused}
    parts = {f"{name}_bytes": count for name, count in parts_of(row.plan).items()}
    return {"strategy": row.strategy, **parts, "fits": row.plan.as_json()["fits"], "plan": row.plan.as_json()}


def table(rows: Iterable[Row], card: Card | None) -> Iterator[str]:
    """The lines; GB are 10^9 bytes."""
    rows = list(rows)
    first = next((row.plan for row in rows if row.plan is not None), None)
    if first is None:
        yield from (f"{row.strategy}: refused: {row.refused}" for row in rows)
        return
    width = max(len(row.strategy) for row in rows)
    unit, power = ("GB", GB) if first.peak_bytes >= GB // 10 else ("MB", 10**6)
    heads = [*parts_of(first), *(["needed"] if card else [])]
    yield (
        f"{first.model}, precision {first.precision}, micro-batches of {first.rows} x {first.seq_len} tokens, "
        f"{first.micro_batches} an update, {first.devices} device{'s' * (first.devices > 1)}; {unit} of {power:,} bytes"
    )
    if card is not None:
        yield f"needed: the peak and what is not tensors; {card.name} has {card.usable_bytes / power:.3f} usable"
    yield ""
    yield f"{'strategy':<{width}}" + "".join(f"{head:>11}" for head in heads) + ("  fits" if card else "")
    for row in rows:
        if row.plan is None:
            yield f"{row.strategy:<{width}}  refused: {row.refused}"
            continue
        counts = [*parts_of(row.plan).values(), *([row.plan.needed_bytes] if card else [])]
        fits = {True: "  yes", False: "  no", None: "  not known"}[row.plan.verdicts[0].fits] if card else ""
        yield f"{row.strategy:<{width}}" + "".join(f"{count / power:>11.3f}" for count in counts) + fits
    yield ""
    yield "Rank and the other keys of each strategy are its own unless the words say so: lowrank explain strategy=NAME"
