"""Tables that a run appends to: one row at a time, cut back when it resumes, intact when the disk is full."""

from __future__ import annotations

import csv
import io
import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lowrank_train.checkpoint import is_disk_full

log = logging.getLogger(__name__)


class CsvFile:
    """A CSV file with fixed columns, the first of which is `step`.

    Each row reaches the operating system before `write` returns. A row that finds no room is kept and written before
    the next one; the file never ends in half a row for that reason.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        assert columns[0] == "step"
        self.path = path
        self.columns = list(columns)
        self._file: io.FileIO | None = None
        self._end = 0  # bytes of whole rows
        self._waiting = b""
        self._warned = False

    def start(self, step: int) -> None:
        """Open for the row after `step`: later rows of an earlier attempt are dropped, and so is a torn last one."""
        kept = [row for row in read_rows(self.path) if int(row["step"]) <= step]
        aside = self.path.with_name(self.path.name + ".partial")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        aside.replace(self.path)
        self._file = io.FileIO(self.path, "r+")
        self._end = self._file.seek(0, os.SEEK_END)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; columns it does not have stay empty."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerow(row)
        self._waiting += text.getvalue().encode("utf-8")
        self._flush()

    def close(self) -> None:
        """Write what is still waiting, or say that it is lost."""
        if self._file is None:
            return
        self._flush()
        if self._waiting:
            log.warning("%s: the last %d rows found no room on the disk", self.path, self._waiting.count(b"\n"))
        self._file.close()
        self._file = None

    def _flush(self) -> None:
        assert self._file is not None, "start() comes first"
        if not self._waiting:
            return
        try:
            written = self._file.write(self._waiting)
        except OSError as error:
            if not is_disk_full(error):
                raise
            written = 0
        if written == len(self._waiting):
            self._end += written
            self._waiting = b""
            return
        self._file.truncate(self._end)
        self._file.seek(self._end)
        if not self._warned:
            log.warning("%s: the disk is full; rows are kept in memory until there is room", self.path)
            self._warned = True


class MetricsCsv(Logger):
    """metrics.csv as one of Lightning's loggers: one row an update, always the same columns."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.file = CsvFile(path, columns)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.file.write(metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of such a file; none where there is no file. A last line without its end is not whole."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = io.StringIO(text[: text.rfind("\n") + 1])
    rows = list(csv.DictReader(whole, restval=None))
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]
