"""Rows of a GLUE split: the published TSV files, JSON lines, or parquet files as the hub has them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.files import did_you_mean, find_local
from lowrank_train.data.glue.tasks import HUB_REPOSITORY, HUB_REVISION, LARGEST_SCORE, TASKS, GlueTask, file_stems
from lowrank_train.data.hub import download_command, why_not
from lowrank_train.data.order import permutation

log = logging.getLogger(__name__)

MOST_DAMAGED = 0.01  # share of the lines of a TSV file; more means that the file is something else
SUFFIXES = (".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class GlueRow:
    """One example."""

    texts: tuple[str, ...]  # one, or a pair
    label: float  # the number of the label, or the score


def read_split(data: DataConfig, split: str) -> list[GlueRow]:
    """The rows of `split`, one of "train" and the task's validation splits, in the order of the file.

    Raises:
        UserError: no such file, a column that is missing, a label that the task does not have, no row at all, or fewer
            than `data.train_rows`.
    """
    task = task_of(data)
    path = split_file(data, split)
    rows = [_row(task, record, f"{path}, {where}") for where, record in _records(path, task)]
    if not rows:
        raise UserError(f"{_key(split)}: {path} holds no row of {task.folder}; give a file with rows")
    if split != "train" or data.train_rows is None:
        return rows
    if data.train_rows > len(rows):
        raise UserError(f"data.train_rows={data.train_rows}: {path} holds {len(rows)} rows; null takes all")
    kept = sorted(permutation(len(rows), f"{task.name} train_rows")[: data.train_rows])
    return [rows[number] for number in kept]


def task_of(data: DataConfig) -> GlueTask:
    """The task that `data.task` names."""
    assert data.task is not None, "config checks demand data.task"
    return TASKS[data.task]


def splits_of(data: DataConfig) -> tuple[str, ...]:
    """The splits that are evaluated: with files of one's own, as many of the task's as there are files."""
    names = task_of(data).validation
    if len(data.validation) > len(names):
        raise UserError(
            f"data.validation: names {len(data.validation)} files, but {task_of(data).folder} is evaluated on "
            f"{len(names)}: {', '.join(names)}, in this order"
        )
    return names[: len(data.validation)] if data.validation else names


def split_file(data: DataConfig, split: str) -> Path:
    """The file of a split: one that is named, one in `data.folder`, or one from the hub at its pinned revision."""
    named = data.train if split == "train" else data.validation
    if named:
        if split == "train" and len(named) > 1:
            raise UserError(f"data.train: names {len(named)} files, but a GLUE task is trained on one")
        given = named[0 if split == "train" else task_of(data).validation.index(split)]
        found = find_local(given)
        if found is None or found.is_dir():
            raise UserError(f"{_key(split)}={given}: there is no such file{did_you_mean(given)}")
        return found
    return _from_hub(data, split) if data.folder is None else _in_folder(data, split)


def _key(split: str) -> str:
    return "data.train" if split == "train" else "data.validation"


def _in_folder(data: DataConfig, split: str) -> Path:
    task, root = task_of(data), find_local(data.folder or "")
    if root is None or not root.is_dir():
        raise UserError(f"data.folder={data.folder}: there is no such folder{did_you_mean(data.folder or '')}")
    folder = next((root / name for name in (task.folder, task.name) if (root / name).is_dir()), root)
    names = [f"{stem}{suffix}" for stem in file_stems(split) for suffix in SUFFIXES]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for path in sorted(folder.glob(f"{split}-*.parquet")):  # as the hub names them
        return path
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise UserError(
        f"data.folder={data.folder}: {folder} has no file of the split {split} (found: {present}); it may be called "
        f"{', '.join(names)}, or be named with {_key(split)}=[FILE]"
    )


def _from_hub(data: DataConfig, split: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = f"{data.task}/{split}-00000-of-00001.parquet"
    revision = data.revision or HUB_REVISION
    try:
        return Path(hf_hub_download(HUB_REPOSITORY, name, repo_type="dataset", revision=revision))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        command = download_command(HUB_REPOSITORY, revision, "--repo-type dataset", f"--include '{data.task}/*'")
        raise UserError(
            f"data.task={data.task}: {name} of {HUB_REPOSITORY} is not in the cache and cannot be fetched "
            f"({why_not(error)}); fetch it where there is a network ({command}), or give data.folder=FOLDER"
        ) from error


def _records(path: Path, task: GlueTask) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, columns by name) of every row."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # MRPC's files begin with a byte order mark
            yield from (_tsv if path.suffix == ".tsv" else _json_lines)(file, path, task)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from error


def _tsv(file: Iterable[str], path: Path, task: GlueTask) -> Iterator[tuple[str, dict[str, Any]]]:
    """Quotes mean nothing in these files. A few lines with another number of columns are left out: QQP's have some."""
    header, damaged, number = list(task.header), [], 0
    for number, line in enumerate(file, 1):
        cells = line.rstrip("\r\n").split("\t")
        if not header:
            header = cells
        elif len(cells) == len(header):
            yield f"line {number}", dict(zip(header, cells, strict=True))
        elif line.strip():
            damaged.append(number)
    if len(damaged) > MOST_DAMAGED * number:
        raise UserError(
            f"{path}, line {damaged[0]}: and {len(damaged) - 1} others have another number of columns than "
            f"{len(header)} ({', '.join(header)}); columns are separated by tabs"
        )
    if damaged:
        log.warning(
            "%s: left out %d lines with a wrong number of columns, line %d first", path, len(damaged), damaged[0]
        )


def _json_lines(file: Iterable[str], path: Path, task: GlueTask) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error}); one object a line is needed") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: holds no object; {', '.join(task.sentences)} and label are needed")
        yield f"line {number}", record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install -e '.[glue]'") from None
    yield from ((f"row {number}", record) for number, record in enumerate(parquet.read_table(path).to_pylist(), 1))


def _row(task: GlueTask, record: dict[str, Any], where: str) -> GlueRow:
    """Columns under the hub's names or the published ones; the fault names what is missing or wrong."""
    columns = next((names for names in (task.sentences, task.native) if all(name in record for name in names)), None)
    label = next((name for name in ("label", task.native_label) if name in record), None)
    if columns is None or label is None:
        needed = " and ".join(dict.fromkeys((", ".join((*task.sentences, "label")),
                                             ", ".join((*task.native, task.native_label)))))  # fmt: skip
        raise UserError(
            f"{where}: the columns of {task.folder} are not there; they are called {needed.replace(' and ', ', or ')}, "
            f"and here are {', '.join(map(str, record))}"
        )
    texts = tuple(record[name] for name in columns)
    for name, text in zip(columns, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{where}: {name} is {text!r}, not a text")
    return GlueRow(texts, _label(task, record[label], f"{where}: {label}={record[label]!r}"))


def _label(task: GlueTask, value: Any, what: str) -> float:
    if task.labels:
        if isinstance(value, str) and value in task.labels:
            return float(task.labels.index(value))
        numbers = {str(number): float(number) for number in range(len(task.labels))}
        if not isinstance(value, bool) and str(value) in numbers:
            return numbers[str(value)]
        named = ", ".join(f"{number} or {name}" for number, name in enumerate(task.labels))
        hidden = "; -1 stands where labels are not public, as in test files" if str(value) == "-1" else ""
        raise UserError(f"{what}: is no label of {task.folder}; its labels are {named}{hidden}")
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= LARGEST_SCORE:
        raise UserError(f"{what}: is no score of {task.folder}; scores are numbers from 0 to {LARGEST_SCORE:g}")
    return score
