"""Run folders read back: configuration, curve and result of a run, whether it is finished or not."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.files import load_container
from lowrank_train.report.glue_rows import is_glue

CONFIG_FILE, METRICS_FILE, RESULT_FILE = "config.yaml", "metrics.csv", "result.json"
NEEDED_OF_RESULT = ("tokens", "seconds", "state_bytes", "peak_memory_bytes")
NEEDED_OF_TEXT = ("val_perplexity", "papers_val_perplexity")

# Keys that move numbers of a run; the others say what to do, where to write and what to print.
OF_THE_RUN = ("seed", "model.", "data.", "strategy.", "precision.", "optim.", "trainer.")
ASIDE = ("trainer.log_every_steps", "trainer.keep_checkpoints", "trainer.save_every_steps")
FILES = ("data.train", "data.validation", "data.tokenizer")
GROUPS = ("model", "data", "strategy", "precision")
"""Groups whose name sums up their keys: those differ only where they do under the same name."""


class BrokenRun(Exception):
    """A folder that holds no run that can be read; the message says why."""


@dataclass(frozen=True)
class Point:
    """One row of metrics.csv, as far as curves need it."""

    step: int
    tokens: int
    seconds: float
    loss: float
    val_loss: float | None


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds."""

    path: Path
    settings: dict[str, Any]  # the configuration by dotted key, files by their names
    rows: list[dict[str, str]]  # of metrics.csv
    points: list[Point]
    result: dict[str, Any] | None  # None: not finished

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def tokens(self) -> int:
        return self.points[-1].tokens if self.points else 0

    @property
    def seconds(self) -> float:
        return self.points[-1].seconds if self.points else 0.0

    @property
    def is_glue(self) -> bool:
        """Whether it trains on a GLUE task, not on text."""
        return self.settings.get("data.source") == "glue"

    @property
    def perplexity(self) -> float | None:
        """Token-weighted; of the last evaluation so far where the run is not finished; None for GLUE."""
        if self.is_glue:
            return None
        if self.result is not None:
            return float(self.result["val_perplexity"])
        losses = [point.val_loss for point in self.points if point.val_loss is not None]
        return math.exp(min(losses[-1], 700)) if losses else None

    @property
    def peak_bytes(self) -> int | None:
        """The most that was measured."""
        if self.result is not None:
            return int(self.result["peak_memory_bytes"])
        return round(self._last("memory/peak_bytes") or 0) or None

    @property
    def planned_peak_bytes(self) -> int | None:
        """The most that the tensors were planned to take, on any device."""
        planned = (self.result or {}).get("planned")
        return int(planned["peak_bytes"]) if planned else None

    @property
    def state_bytes(self) -> int | None:
        return None if self.result is None else sum(self.result["state_bytes"].values())

    @property
    def tokens_per_sec(self) -> float | None:
        """Of a finished run without evaluations and saving; so far: the median of its updates after the first."""
        if self.result is not None:
            return float(self.result["tokens_per_sec"])
        return self.median("throughput/tokens_per_sec")

    @property
    def on_gpu(self) -> bool | None:
        """Whether the measured memory is that of a GPU; None where that is not known yet."""
        return None if self.result is None else self.result["hardware"]["kind"] != "cpu"

    def median(self, column: str) -> float | None:
        """Of the numbers in a column of metrics.csv, without the first update, which warms up."""
        found = [value for row in self.rows[1:] if (value := number(row.get(column))) is not None]
        return statistics.median(found) if found else None

    def _last(self, column: str) -> float | None:
        return number(self.rows[-1].get(column)) if self.rows else None


def read_run(path: Path) -> RunRecord:
    """Raises BrokenRun, with the reason, for a folder that is no run or whose files cannot be read."""
    if not path.is_dir():
        raise BrokenRun("is no folder")
    if not (path / CONFIG_FILE).is_file():
        raise BrokenRun(f"has no {CONFIG_FILE}; it is no run folder")
    try:
        config = load_container(path / CONFIG_FILE)
    except UserError as error:
        raise BrokenRun(str(error).removeprefix(f"{path}/")) from None
    rows = read_metrics(path / METRICS_FILE)
    result = read_result(path / RESULT_FILE)
    points = list(_points(rows))
    if not points:
        raise BrokenRun(f"has no {METRICS_FILE} with a finished update in it")
    settings = {key: _without_folder(value) if key in FILES else value for key, value in flat(config).items()}
    return RunRecord(path, settings, rows, points, result)


def _without_folder(value: Any) -> Any:
    """Names for files on the machine that ran: where its checkout lay is no difference between runs."""
    if isinstance(value, list):
        return [_without_folder(item) for item in value]
    is_file = isinstance(value, str) and "://" not in value and (Path(value).is_absolute() or Path(value).suffix)
    return Path(value).name if is_file else value


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows; half a row that a killed run left at the end is left out."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BrokenRun(f"{path.name} cannot be read: {error}") from None
    return [row for row in rows if None not in row.values() and None not in row]


def read_result(path: Path) -> dict[str, Any] | None:
    """What the run ended with; None while it has not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BrokenRun(f"{path.name} cannot be read: {error}") from None
    wanted = NEEDED_OF_RESULT if isinstance(found, dict) and is_glue(found) else (*NEEDED_OF_TEXT, *NEEDED_OF_RESULT)
    missing = [key for key in wanted if not isinstance(found, dict) or key not in found]
    if missing:
        raise BrokenRun(f"{path.name} lacks {', '.join(missing)}")
    result: dict[str, Any] = found
    return result


def _points(rows: Iterable[Mapping[str, str]]) -> Iterator[Point]:
    for row in rows:
        needed = [number(row.get(name)) for name in ("step", "tokens", "time/elapsed_sec", "train/loss")]
        if None not in needed:
            step, tokens, seconds, loss = (float(value) for value in needed if value is not None)
            yield Point(int(step), int(tokens), seconds, loss, number(row.get("val/loss")))


def number(text: str | None) -> float | None:
    """A cell of metrics.csv; None for an empty one, for text, and for what is not finite."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key and value of every leaf."""
    if isinstance(node, dict) and (node or not prefix):
        return {
            name: leaf
            for key, value in node.items()
            for name, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: node}


def differing(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Key -> the value of each run, for keys in which the runs differ; those of a group under the same name alone.

    A strategy's rank is listed where two runs of that strategy have different ones, not where one has none.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings if _counts(key))
    return {
        key: [run.settings.get(key) for run in runs]
        for key in keys
        if any(_differs(key, others) for others in _under_one_name(key, runs))
    }


def _under_one_name(key: str, runs: list[RunRecord]) -> Iterator[list[RunRecord]]:
    group = key.partition(".")[0]
    if group not in GROUPS or key == f"{group}.name":
        yield runs
        return
    by_name: dict[Any, list[RunRecord]] = {}
    for run in runs:
        by_name.setdefault(run.settings.get(f"{group}.name"), []).append(run)
    yield from by_name.values()


def _differs(key: str, runs: list[RunRecord]) -> bool:
    return any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)


def _counts(key: str) -> bool:
    return key.startswith(OF_THE_RUN) and key not in ASIDE


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
