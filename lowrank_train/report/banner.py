"""What a run says before it starts: model, strategy, batch arithmetic, which matrices get which rule."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from lowrank_train.report.units import format_bytes, format_count


class Assigned(Protocol):
    """One parameter of the strategy's assignment."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def role(self) -> str: ...
    @property
    def side(self) -> str: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def residue_bytes(self) -> int: ...


@dataclass(frozen=True)
class BatchArithmetic:
    """How rows become an update."""

    batch_size: int  # rows per device and micro-batch
    micro_batches: int
    devices: int
    seq_len: int

    @property
    def rows(self) -> int:
        return self.batch_size * self.micro_batches * self.devices

    def sentence(self) -> str:
        return (
            f"{self.batch_size} rows x {self.micro_batches} micro-batches x {self.devices} devices = {self.rows} rows "
            f"an update, x {self.seq_len} tokens = {self.rows * self.seq_len:,} tokens"
        )


def assignment_lines(rows: Sequence[Assigned]) -> list[str]:
    """A table with one line for all parameters that differ only in the number of their layer."""
    groups: dict[tuple[object, ...], list[Assigned]] = {}
    for row in rows:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", row.name)
        groups.setdefault((pattern, row.role, row.shape, row.side, row.rank), []).append(row)
    cells = [("parameter", "count", "shape", "rule", "rank", "side", "state")]
    for (group, role, shape, side, rank), members in groups.items():
        assert isinstance(shape, tuple)
        cells.append((
            str(group),
            str(len(members)),
            " x ".join(map(str, shape)),
            str(role),
            "" if rank is None else str(rank),
            str(side),
            format_bytes(sum(member.state_bytes for member in members)),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells]  # fmt: skip


def head_lines(rows: Sequence[Assigned], head: Collection[str]) -> list[str]:
    """That the parameters `head`, which make labels of hidden states, are trained, where others are frozen."""
    modules = list(dict.fromkeys(row.name.rpartition(".")[0] for row in rows if row.name in head))
    frozen = any(row.role == "frozen" for row in rows)
    return [f"head of the task, trained whole: {', '.join(modules)}"] if modules and frozen else []


def model_sentence(name: str, parameters: int, trainable: int, weights_bytes: int, dtype: str) -> str:
    """Size of the model in one line."""
    share = "" if trainable == parameters else f", {format_count(trainable)} of them trained"
    return f"{name}: {format_count(parameters)} parameters{share}, {format_bytes(weights_bytes)} in {dtype}"


def phase_line(name: str, seconds: float, peak_bytes: int, note: str) -> str:
    """One phase of a rehearsal: how long it took, and the most memory in use meanwhile."""
    return f"  {name:<22}  {seconds:>7.1f} s  {format_bytes(peak_bytes):>10}  {note}".rstrip()
