"""TensorBoard and wandb beside metrics.csv: a choice, never a condition, and no failure of theirs ends a run."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import LoggerConfig

log = logging.getLogger(__name__)


class GuardedLogger(Logger):
    """Another logger behind a fuse: its first failure becomes one warning, and it is not used again."""

    def __init__(self, label: str, make: Callable[[], Logger]) -> None:
        super().__init__()
        self._label = label
        self._make = make
        self._params: dict[str, Any] | Namespace | None = None
        self._inner: Logger | None = None
        self._blown = False

    @property
    def name(self) -> str:
        return self._label

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        numbers = {key: value for key, value in metrics.items() if value != "" and key != "step"}
        self._try(lambda inner: inner.log_metrics(numbers, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Kept until there is something to log: a start that is called off before it leaves nothing behind."""
        self._params = params

    def finalize(self, status: str) -> None:
        if self._inner is not None:
            self._try(lambda inner: inner.finalize(status))

    def _try(self, action: Callable[[Logger], Any]) -> None:
        if self._blown:
            return
        try:
            if self._inner is None:
                self._inner = self._make()
                if self._params is not None:
                    self._inner.log_hyperparams(self._params)
            action(self._inner)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever it raises, the run is worth more)
            self._blown = True
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("%s failed and is left out from here on: %s", self._label, reason[0])


def extra_loggers(config: LoggerConfig, folder: Path, run_name: str, *, step: int) -> list[Logger]:
    """The logger that the configuration names beside CSV. UserError when its library is not installed."""
    if config.name == "csv":
        return []
    if importlib.util.find_spec(config.name) is None:
        raise UserError(
            f"logger={config.name} needs the library {config.name}: pip install 'lowrank_train[{config.name}]', "
            "or use logger=csv"
        )
    if config.name == "tensorboard":
        # purge_step hides the points that a killed run wrote after its last checkpoint
        make: Callable[[], Logger] = lambda: TensorBoardLogger(  # noqa: E731  (built only when first used)
            folder, name="", version="tensorboard", purge_step=step + 1 if step else None
        )
    else:
        make = lambda: WandbTable(config, folder, run_name)  # noqa: E731
    return [GuardedLogger(config.name, make)]


class WandbTable(Logger):
    """A wandb run with the id of its folder. What the user did not set is left to wandb's environment variables."""

    def __init__(self, config: LoggerConfig, folder: Path, run_name: str) -> None:
        super().__init__()
        os.environ.setdefault("WANDB_SILENT", "true")  # read when it is imported; our own lines say what is to say
        import wandb

        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
        given: dict[str, Any] = {"entity": config.entity} if config.entity else {}
        mode = wandb_mode(config.offline)
        if mode is not None:
            given["mode"] = mode
        if mode == "offline":
            log.warning("wandb is offline; send the run later with: wandb sync %s", folder / "wandb" / "offline-run-*")
        chosen = config.project != LoggerConfig.project
        self._run = wandb.init(
            name=run_name,
            project=config.project if chosen else os.environ.get("WANDB_PROJECT", config.project),
            dir=folder,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            **given,
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")  # wandb's own step cannot go back after a resume

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return str(self._run.id)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._run.log({**metrics, "update": step})

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._run.config.update(params, allow_val_change=True)

    def finalize(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "success" else 1)


def wandb_mode(offline: bool | None) -> str | None:
    """What to tell wandb: offline where it would otherwise ask for a key; None where its own environment decides."""
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("disabled", "offline", "dryrun"):
        return None
    if offline or not _has_wandb_key():
        return "offline"
    return None if wanted else "online"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
