"""Tables a run appends to: cut back at a resume, whole on a full disk."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from lowrank_train.train.csv_file import CsvFile, MetricsCsv, read_rows

COLUMNS = ("step", "loss", "note")


def opened(path: Path, step: int = 0) -> CsvFile:
    table = CsvFile(path, COLUMNS)
    table.start(step)
    return table


def test_each_row_is_on_disk_at_once_with_every_column(tmp_path: Path) -> None:
    table = opened(tmp_path / "t.csv")
    table.write({"step": 1, "loss": 0.1})
    assert (tmp_path / "t.csv").read_text() == "step,loss,note\n1,0.1,\n"
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        table.write({"step": 2, "lost": 1})


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    table = opened(tmp_path / "t.csv")
    table.write({"step": 1, "loss": value})
    assert float(read_rows(tmp_path / "t.csv")[0]["loss"]) == value


def test_resuming_drops_later_rows_and_a_torn_last_one(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,loss,note\n1,0.5,a\n2,0.4,b\n3,0.3,c\n4,0.2")
    assert [row["step"] for row in read_rows(path)] == ["1", "2", "3"]
    path.write_text("step,loss,note\n1,0.5,a\n2,0.4,b\n3,0.3,c\n4,0.2,")  # all columns, but perhaps not all digits
    table = opened(path, step=2)
    table.write({"step": 3, "loss": 0.25})
    assert path.read_text() == "step,loss,note\n1,0.5,a\n2,0.4,b\n3,0.25,\n"


def test_a_file_with_other_columns_is_brought_to_these(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,old,loss\n1,x,0.5\n")
    opened(path, step=5).close()
    assert path.read_text() == "step,loss,note\n1,0.5,\n"


def test_without_room_rows_wait_and_none_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    table = opened(path)
    table.write({"step": 1, "loss": 0.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, limits[1]))
        table.write({"step": 2, "loss": 0.4})
        table.write({"step": 3, "loss": 0.3})
        assert path.read_text() == "step,loss,note\n1,0.5,\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    table.write({"step": 4, "loss": 0.2})
    table.close()
    assert [row["step"] for row in read_rows(path)] == ["1", "2", "3", "4"]
    assert len(caplog.records) == 1


def test_other_failures_are_not_hidden(tmp_path: Path) -> None:
    table = opened(tmp_path / "t.csv")
    assert table._file is not None
    os.close(table._file.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        table.write({"step": 1})


def test_the_lightning_logger_writes_the_same_rows(tmp_path: Path) -> None:
    logger = MetricsCsv(tmp_path / "metrics.csv", COLUMNS)
    logger.file.start(0)
    logger.log_metrics({"step": 1, "loss": 2.0}, step=1)
    assert read_rows(tmp_path / "metrics.csv") == [{"step": "1", "loss": "2.0", "note": ""}]
