"""TensorBoard and wandb are guests: they are fed when they are well and forgotten when they are not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import LoggerConfig
from lowrank_train.train.loggers import GuardedLogger, WandbTable, extra_loggers, wandb_mode


class Broken(Logger):
    calls = 0

    @property
    def name(self) -> str:
        return "broken"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        Broken.calls += 1
        raise ConnectionError("no route to host\nmore")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_failure_becomes_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    logger = GuardedLogger("broken", Broken)
    for step in range(3):
        logger.log_metrics({"step": step, "loss": 1.0}, step)
    logger.finalize("success")
    assert Broken.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "broken failed and is left out from here on: no route to host"
    ]


def test_what_is_called_off_before_it_logs_leaves_nothing() -> None:
    made: list[Any] = []

    def make() -> Logger:
        inner = MagicMock()
        made.append(inner)
        return inner

    logger = GuardedLogger("late", make)
    logger.log_hyperparams({"lr": 1.0})
    logger.finalize("failed")
    assert made == []
    logger.log_metrics({"step": 1, "loss": 2.0}, 1)
    logger.log_metrics({"step": 2, "loss": 1.0}, 2)
    [inner] = made
    assert [entry[0] for entry in inner.method_calls] == ["log_hyperparams", "log_metrics", "log_metrics"]


def test_a_constructor_that_exits_is_a_failure_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    def leave() -> Logger:
        raise SystemExit(1)

    GuardedLogger("exiting", leave).log_metrics({"loss": 1.0}, 1)
    assert len(caplog.records) == 1


def test_tensorboard_gets_numbers_only(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (logger,) = extra_loggers(LoggerConfig(name="tensorboard"), tmp_path, "r", step=0)
    for step in (1, 2):
        row: dict[str, Any] = {"step": step, "train/loss": 2.0 / step, "val/loss": ""}
        logger.log_metrics(row, step)
    logger.finalize("success")
    assert isinstance(logger, GuardedLogger) and isinstance(logger._inner, TensorBoardLogger)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    assert "val/loss" not in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("environment", "offline", "expected"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, None, "online"),
        ({"WANDB_API_KEY": "k" * 40}, True, "offline"),
        ({}, False, "offline"),  # without a key it would ask
        ({"WANDB_MODE": "online"}, None, "offline"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "k" * 40}, None, None),
        ({"WANDB_MODE": "disabled"}, None, None),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k" * 40}, False, None),
    ],
)
def test_wandb_never_has_reason_to_ask(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    offline: bool | None,
    expected: str | None,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(offline) == expected


def test_a_key_in_netrc_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(None) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(None) == "offline"


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lowrank_train\[wandb\]"):
        extra_loggers(LoggerConfig(name="wandb"), tmp_path, "r", step=0)


def test_a_run_that_goes_on_is_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and started again, or requeued: the id lies in the run folder, and another folder has another."""
    begun: list[dict[str, object]] = []

    class Run:
        id = "x"

        def define_metric(self, *_: object, **__: object) -> None:
            pass

    def init(**given: object) -> Run:
        begun.append(given)
        return Run()

    fake = SimpleNamespace(init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        WandbTable(LoggerConfig(name="wandb"), folder, "r")
    ids = [given["id"] for given in begun]
    assert ids[0] == ids[1] != ids[2] and {given["resume"] for given in begun} == {"allow"}
