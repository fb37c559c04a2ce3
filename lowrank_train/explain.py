"""`lowrank explain`: a strategy in words and numbers for one model, without a single weight in memory."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.config import UserError, compose, paths
from lowrank_train.config.parts import AXES, TARGET
from lowrank_train.config.schema import RunConfig, StrategyConfig
from lowrank_train.data import tokenizer_of
from lowrank_train.memory.counting import bytes_of
from lowrank_train.models import meta_model, outputs_of
from lowrank_train.nn.reparam import layers_of
from lowrank_train.report.banner import model_sentence
from lowrank_train.report.savings import advice, advice_on_layers, saving
from lowrank_train.report.units import format_bytes
from lowrank_train.strategy import Assignment, Strategy

PLAIN_KEYS = ("on_refresh", "when", "basis_under_accumulation", "freeze_rest")
WHY = {
    "projected": "matches strategy.select",
    "selected": "matches strategy.select; its rule runs on the whole tensor",
    "rest": "matches no pattern of strategy.select",
    "frozen": "not trained",
}


def explain(config: RunConfig) -> int:
    """Print the equation, the parts in force, and what becomes of every tensor; UserError for what cannot be."""
    print("\n".join(explanation(config)))
    return 0


def explanation(config: RunConfig) -> list[str]:
    """The lines of `explain`."""
    vocab_size = config.model.vocab_size or tokenizer_of(config).vocab_size
    model = meta_model(
        config.model,
        vocab_size=vocab_size,
        dtype=getattr(torch, config.precision.weights),
        outputs=outputs_of(config.data),
    )
    state_dtype = getattr(torch, config.precision.state)
    strategy = Strategy.from_config(
        config.strategy,
        state_dtype=state_dtype,
        seed=config.seed,
        rounding=config.precision.rounding,
        int8_group=config.precision.int8_group,
    )
    plain = [tuple(parameter.shape) for parameter in model.parameters()]
    strategy.prepare(model)
    rows = strategy.assignment(model)
    lines = [*head(config.strategy.name), "", "Parts in force (* differs from the strategy's own):"]
    lines += parts_in_force(config.strategy, own_defaults(config.strategy.name))
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    weights_bytes = bytes_of(parameters)
    trained = sum(math.prod(row.shape) for row in rows if row.role != "frozen")
    lines += ["", model_sentence(config.model.name, size, trained, weights_bytes, config.precision.formats), ""]
    lines += tensor_table(described(rows, kinds_by_name(strategy, model)))
    lines += ["", *totals(rows, state_dtype.itemsize, plain)]
    remarks = (
        advice(config.strategy.name, rows, state_dtype.itemsize),
        advice_on_layers(config.strategy.name, layers_of(model).values()),
    )
    return [*lines, *(f"warning: {remark}" for remark in remarks if remark)]


def head(strategy: str) -> list[str]:
    """What the file of a strategy says at its top: paper, formulas, parts, state, departures."""
    path = paths.CONF / "strategy" / f"{strategy}.yaml"
    if not path.is_file():  # a run's own name
        return [f"strategy {strategy}"]
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]


def own_defaults(strategy: str) -> StrategyConfig | None:
    """The strategy as its file has it; None where there is no such file."""
    try:
        return compose([f"strategy={strategy}", "recipe=null", "task=explain"]).strategy
    except UserError:
        return None


def parts_in_force(chosen: StrategyConfig, own: StrategyConfig | None) -> Iterator[str]:
    """One line an axis: the part, what it is, and its keys."""
    for axis in AXES:
        part = getattr(chosen, axis)
        before = getattr(own, axis) if own is not None else part
        if not part:
            if before:
                yield f"* {axis}: none; the strategy's own is {class_name(before)}"
            continue
        mark = "*" if not before or before[TARGET] != part[TARGET] else " "
        yield f"{mark} {axis}: {class_name(part)}  {', '.join(values(part, before or {}))}".rstrip()
        yield f"      {summary(part)}"
    for key in PLAIN_KEYS:
        value, before = getattr(chosen, key), getattr(own, key) if own is not None else None
        changed = own is not None and value != before
        yield f"{'*' if changed else ' '} {key}: {shown(value)}" + (f" (its own: {shown(before)})" if changed else "")


def values(part: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """`key value` of every key of a part, marked where the strategy's own part of that class has another."""
    same_class = part[TARGET] == before.get(TARGET)
    for key, value in part.items():
        if key == TARGET:
            continue
        changed = same_class and before.get(key) != value
        yield f"{'*' if changed else ''}{key} {shown(value)}" + (f" (its own: {shown(before.get(key))})" * changed)


def shown(value: Any) -> str:
    """A value as it would be written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list | tuple) else str(value)


def class_name(part: Mapping[str, Any]) -> str:
    """The class of a part, without its module."""
    return str(part[TARGET]).rpartition(".")[2]


def summary(part: Mapping[str, Any]) -> str:
    """The first sentence of the documentation of a part's class: its formula, and the paper."""
    module, _, name = str(part[TARGET]).rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def kinds_by_name(strategy: Strategy, model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Parameter name -> bytes of each kind of its state, as the optimizer would allocate it."""
    optimizer = strategy.optimizer(model, lr=1.0)
    optimizer.initialize()
    found: dict[str, dict[str, int]] = {}
    for param, slot in optimizer.slots.items():
        kinds = found.setdefault(slot.name, {})
        for key, value in optimizer.kept_of(param).items():
            if isinstance(value, Tensor):
                kind = key.partition("_")[0].partition(".")[0] if key.startswith("basis") else key.partition(".")[0]
                kinds[kind] = kinds.get(kind, 0) + value.numel() * value.element_size()
    return found


@dataclass(frozen=True)
class Described:
    """A row of the assignment with the bytes of its state by kind, and the reason for its rule."""

    row: Assignment
    kinds: Mapping[str, int]
    why: str


def described(rows: Iterable[Assignment], kinds: Mapping[str, Mapping[str, int]]) -> Iterator[Described]:
    """Why each tensor is served as it is."""
    rows = list(rows)
    one_rule = not any(row.role in ("projected", "selected") for row in rows)
    for row in rows:
        why = WHY[row.role]
        if row.role == "rest" and one_rule:
            why = "one rule for all tensors"
        elif row.role == "rest" and len(row.shape) != 2:
            why = f"{len(row.shape)}-dimensional; only matrices are projected"
        yield Described(row, kinds.get(row.name, {}), why)


def anonymous(name: str) -> str:
    """A parameter's name without the numbers of its layer and of its place in a list."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def tensor_table(found: Iterable[Described]) -> list[str]:
    """One line for all tensors that differ only in the number of their layer; bytes are their sum."""
    groups: dict[tuple[object, ...], list[Described]] = {}
    for item in found:
        row = item.row
        group = (anonymous(row.name), row.role, row.shape, row.side, row.rank, item.why)
        groups.setdefault(group, []).append(item)
    kinds = list(dict.fromkeys(kind for items in groups.values() for item in items for kind in item.kinds))
    table = [["tensor", "count", "shape", "rule", "side", "rank", *kinds, "why"]]
    for items in groups.values():
        row, sums = items[0].row, [sum(item.kinds.get(kind, 0) for item in items) for kind in kinds]
        first = [anonymous(row.name), str(len(items)), " x ".join(map(str, row.shape)), row.role, row.side]
        of_kinds = [format_bytes(count) if count else "" for count in sums]
        table.append([*first, "" if row.rank is None else str(row.rank), *of_kinds, items[0].why])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def totals(rows: list[Assignment], element_bytes: int, plain: list[tuple[int, ...]]) -> Iterator[str]:
    """Bytes of all state, of the projected matrices and of the rest, beside AdamW's on the `plain` model's shapes."""
    projected = [row for row in rows if row.role == "projected"]
    for label, members, shapes in (
        ("projected", projected, [row.shape for row in projected]),
        ("all tensors", rows, plain),
    ):
        if members:
            found = saving(members, element_bytes, shapes)
            yield (
                f"state of {label}: {format_bytes(found.strategy_bytes)}; AdamW {format_bytes(found.adamw_bytes)}, "
                f"8-bit AdamW {format_bytes(found.adamw_8bit_bytes)}"
            )
    residues = sum(row.residue_bytes for row in rows)
    if residues:
        yield f"residues of the weights, the same under every strategy: {format_bytes(residues)}"
