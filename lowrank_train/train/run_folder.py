"""The run folder: made, moved aside, locked, and asked where a run goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lowrank_train.checkpoint import (
    PARTIAL_SUFFIX,
    DamagedCheckpoint,
    checkpoint_folders,
    checkpoint_step,
    newest_complete,
    read_manifest,
)
from lowrank_train.config.errors import UserError
from lowrank_train.config.files import load_container, save, to_container
from lowrank_train.config.schema import RunConfig
from lowrank_train.train.slurm import came_back, leave_name

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.csv"
CHECKPOINTS = "checkpoints"

# Keys that may change when a run goes on: they move when something is said or saved, not the numbers of training.
FREE_KEYS = (
    "task", "run_name", "output_dir", "resume", "rehearse", "run", "best", "out",
    "logger.", "generate.",
    "data.num_workers", "data.log_documents", "data.samples", "data.sample_tokens", "precision.count_lost_updates",
    "trainer.eval_every_steps", "trainer.save_every_steps", "trainer.keep_checkpoints", "trainer.keep_best",
    "trainer.log_every_steps",
    "trainer.threads", "trainer.accelerator",
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.reduce", "trainer.batch_size",
    "trainer.total_batch_size",  # as long as an update sees as many rows, see changed_keys
)  # fmt: skip
# Keys that decide the shapes in a checkpoint, or what an update is: they stay even with resume=PATH.
FIXED_KEYS = (
    "model.", "strategy.", "precision.weights", "precision.state", "precision.int8_group", "data.tokenizer",
    "trainer.total_batch_size",
)  # fmt: skip


@dataclass
class RunFolder:
    """Where a run lives and what it goes on from."""

    path: Path
    resume_from: Path | None = None  # a complete checkpoint
    finished: dict[str, Any] | None = None  # the result of a run that has nothing left to do
    curve_from: Path | None = None  # metrics.csv of the run that this one continues under another name
    remarks: list[str] = field(default_factory=list)  # for the console, once there is one
    _lock: TextIO | None = None

    @property
    def step(self) -> int:
        """The number of updates that are already done."""
        return checkpoint_step(self.resume_from) if self.resume_from is not None else 0

    def close(self) -> None:
        """Let another process train here."""
        if self._lock is not None:
            self._lock.close()


def run_folder_path(config: RunConfig) -> Path:
    """runs/<model>-<strategy>-<data>, or the name that was given."""
    name = config.run_name or f"{config.model.name}-{config.strategy.name}-{config.data.name}"
    return Path(config.output_dir) / name


def prepare_run_folder(config: RunConfig, *, is_first_rank: bool) -> RunFolder:
    """Decide where the run goes on and make its folder; only the first rank writes.

    UserError when the folder holds a run with other numbers, when resume=PATH has nothing to go on from, or when
    another process trains there.
    """
    path = run_folder_path(config)
    lock = _lock(path) if is_first_rank else None
    folder = RunFolder(path, _lock=lock)
    # What resume says is for the first start of a job; where Slurm has requeued it, it goes on with what it had begun.
    goes_on = config.resume == "auto" or (
        came_back(path) and (config.resume == "false" or bool(checkpoint_folders(path / CHECKPOINTS)))
    )
    if goes_on:
        _resume_in_place(config, folder)
    elif config.resume == "false":
        if is_first_rank and (path / CONFIG_FILE).exists():
            if lock is not None:
                lock.close()
            folder.remarks.append(f"{path} was moved to {_move_aside(path)}; starting over")
            folder._lock = _lock(path)
    else:
        _resume_from_path(config, folder)
    if is_first_rank and folder.finished is None:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for left_over in (path / CHECKPOINTS).glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(left_over)
        (path / RESULT_FILE).unlink(missing_ok=True)
        if folder.curve_from is not None and folder.curve_from.exists():
            shutil.copyfile(folder.curve_from, path / METRICS_FILE)
            _bring_best(folder)
        aside = path / (CONFIG_FILE + PARTIAL_SUFFIX)
        save(config, aside)
        aside.replace(path / CONFIG_FILE)
        leave_name(path)
    return folder


def _bring_best(folder: RunFolder) -> None:
    """Copy the best weights that the continued run had by then."""
    assert folder.curve_from is not None
    for best in checkpoint_folders(folder.curve_from.parent / CHECKPOINTS, "best"):
        target = folder.path / CHECKPOINTS / best.name
        if checkpoint_step(best) <= folder.step and not target.exists():
            shutil.copytree(best, target)


def changed_keys(config: RunConfig, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (saved value, value now)} for every key that moves the numbers of training."""
    before, now = _flat(saved), _flat(to_container(config))
    changed = {
        key: (before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value and not _is_among(key, FREE_KEYS)
    }
    rows_before, rows_now = _rows_of_update(now | before), _rows_of_update(now)
    if rows_before != rows_now:
        changed["trainer.total_batch_size"] = (rows_before, rows_now)
    if config.optim.schedule == "constant":  # then the rate does not depend on the length
        changed.pop("trainer.steps", None)
    return changed


def _resume_in_place(config: RunConfig, folder: RunFolder) -> None:
    path = folder.path
    if not (path / CONFIG_FILE).exists():
        return
    folder.resume_from, passed_over = newest_complete(path / CHECKPOINTS)
    folder.remarks += [f"passed over a damaged checkpoint: {line}" for line in passed_over]
    if folder.resume_from is None:
        if passed_over:
            raise UserError(
                [*passed_over, f"no checkpoint in {path} is complete; start over with resume=false or run_name=NAME"]
            )
        return  # it ended before its first checkpoint: nothing to go on from
    changed = changed_keys(config, load_container(path / CONFIG_FILE))
    if changed:
        raise UserError(
            [f"{key} is {_shown(now)}, but the run in {path} has {_shown(before)}" for key, (before, now) in
             changed.items()]
            + [f"the run in {path} cannot go on with other numbers: give this one a name of its own with "
               "run_name=NAME, or start over with resume=false (the old folder is kept)"]
        )  # fmt: skip
    folder.finished = _finished_result(config, folder)


def _resume_from_path(config: RunConfig, folder: RunFolder) -> None:
    given = Path(config.resume)
    if (given / CHECKPOINTS).is_dir():
        folder.resume_from, passed_over = newest_complete(given / CHECKPOINTS)
        folder.remarks += [f"passed over a damaged checkpoint: {line}" for line in passed_over]
        home = given
    else:
        home = given.parent.parent
        if given in checkpoint_folders(given.parent, "best"):
            raise UserError(
                f"resume={config.resume} holds weights alone, without the optimizer's state; go on from a step_ folder "
                "beside it, or export it (lowrank export best=true) and start anew with model.path="
            )
        try:
            read_manifest(given)
        except DamagedCheckpoint as error:
            raise UserError(f"resume={config.resume} is not a complete checkpoint: {error}") from None
        folder.resume_from = given
    if folder.resume_from is None:
        raise UserError(f"resume={config.resume} holds no complete checkpoint; use a run folder or a checkpoint in it")
    in_place = home.resolve() == folder.path.resolve()
    own = checkpoint_folders(folder.path / CHECKPOINTS)
    if own and (not in_place or checkpoint_step(own[-1]) > folder.step):
        raise UserError(
            f"resume={config.resume} would go on in {folder.path}, which holds {'later' if in_place else 'other'} "
            "checkpoints; name a new folder with run_name=NAME"
        )
    if not in_place:
        folder.curve_from = home / METRICS_FILE
    if not (home / CONFIG_FILE).exists():
        return
    changed = changed_keys(config, load_container(home / CONFIG_FILE))
    fixed = {key: values for key, values in changed.items() if _is_among(key, FIXED_KEYS)}
    if fixed:
        raise UserError([
            f"{key} is {_shown(now)}, but the checkpoint {given} was made with {_shown(before)}; keep it to go on"
            for key, (before, now) in fixed.items()
        ])  # fmt: skip
    folder.remarks += [f"{key} was {_shown(before)}, is now {_shown(now)}" for key, (before, now) in changed.items()]


def _finished_result(config: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that is complete under this configuration, or None."""
    path = folder.path / RESULT_FILE
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    complete = folder.step >= config.trainer.steps or result.get("data_ended", False)
    return result if complete and result.get("steps") == folder.step else None


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _lock(path: Path) -> TextIO | None:
    """Held by the process that trains in a folder, released by the system however the process ends."""
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"another process is training in {path}; wait for it, or choose run_name=NAME") from None
        lock.close()
        return None  # a file system without locks
    return lock


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {
            name: leaf
            for key, value in node.items()
            for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: node}


def _rows_of_update(keys: dict[str, Any]) -> Any:
    """However they are shared out among devices and micro-batches."""
    each = [keys.get(f"trainer.{key}", 1) for key in ("batch_size", "devices", "num_nodes")]
    return keys.get("trainer.total_batch_size") or math.prod(each)


def _is_among(key: str, names: tuple[str, ...]) -> bool:
    """Names that end in a dot stand for all keys below."""
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
