"""Lightning's way into our checkpoint folders, and when they are written and removed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from lowrank_train import __version__
from lowrank_train.checkpoint import (
    checkpoint_folders,
    checkpoint_step,
    is_disk_full,
    load_state,
    load_weights,
    read_manifest,
    save_checkpoint_folder,
)

log = logging.getLogger(__name__)

RUN_KEY = "lowrank_train"  # our part of Lightning's dictionary
WEIGHTS_PREFIX = "model."  # the module's name for the model; the file holds the model's own names


class FolderCheckpoints(CheckpointIO):
    """Splits Lightning's dictionary into weights, state and manifest, and puts it together again.

    A disk without room is not an exception here, because only the first rank writes and the others would wait for it:
    `failure` holds the reason, or None after a success.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        state = dict(checkpoint)
        weights = {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in state.pop("state_dict").items()}
        facts = {"step": state["global_step"], "lowrank_train": __version__, **state[RUN_KEY]["facts"]}
        try:
            if any(hasattr(tensor, "to_local") for tensor in weights.values()):  # on all ranks at once
                from lowrank_train.train.sharded_io import save_sharded_folder

                save_sharded_folder(Path(path), weights, state, facts)
            else:
                save_checkpoint_folder(Path(path), weights, state, facts)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.failure = str(error)
        else:
            self.failure = None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        folder = Path(path)
        weights = load_weights(folder, read_manifest(folder))
        return {
            **load_state(folder),
            "state_dict": {WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()},
        }

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def keep_newest(self, parent: Path, count: int, *, step: int) -> None:
        """Remove all but the `count` newest checkpoints up to `step`, whose own was just completed.

        A later one can only be damaged, passed over when the run went on: it must not push out a good one.
        """
        done = [folder for folder in checkpoint_folders(parent) if checkpoint_step(folder) <= step]
        for folder in done[: -max(1, count)]:
            self.remove_checkpoint(folder)
