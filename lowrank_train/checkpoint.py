"""A checkpoint as a folder: written aside, checked by sums, renamed when complete, read without running any code."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowrank_train.checkpoint_shards import SHARDS_FOLDER, put_together, read_weights

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "training_state.pt"
MANIFEST_FILE = "manifest.json"
PARTIAL_SUFFIX = ".partial"

State = dict[str, Any]
Kind = Literal["step", "best"]
"""Of a checkpoint: one to go on from, or the weights of a run's best evaluation, without the optimizer's state."""


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that is incomplete or whose bytes changed; says what is wrong with which file."""


def save_checkpoint_folder(folder: Path, weights: dict[str, torch.Tensor], state: State, facts: State) -> None:
    """Write a checkpoint, so that `folder` either does not exist or is complete.

    `weights` are the model's own names and tensors (tied ones may share storage), `state` is everything else (tensors,
    numbers, strings and containers of them) and `facts` goes into the manifest as it is (JSON). Raises OSError, with
    nothing left behind, when the disk has no room.
    """
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    if partial.exists():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    require_room(partial.parent, tensor_bytes(weights) + tensor_bytes(state))
    try:
        partial.mkdir()
        tensors, aliases = _without_aliases(weights)
        try:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # its I/O errors carry the cause only as text
            raise OSError(errno.ENOSPC, f"could not write {WEIGHTS_FILE}: {error}") from error
        save_state(state, partial / STATE_FILE)
        manifest = {
            **facts,
            "aliases": aliases,
            "files": {name: size_and_sum(partial / name) for name in (WEIGHTS_FILE, STATE_FILE)},
        }
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            fsync(path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    complete(partial, folder)


def complete(partial: Path, folder: Path) -> None:
    """Give what has been written, down to the disk, its name."""
    if folder.exists():  # the same step saved again, after a resume
        shutil.rmtree(folder)
    partial.rename(folder)
    fsync(folder.parent)


def read_manifest(folder: Path) -> State:
    """The manifest of a checkpoint whose files all have the right size and sum; raises DamagedCheckpoint otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder}: no readable {MANIFEST_FILE}") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{folder}: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(f"{folder}: {name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        if size_and_sum(path) != expected:
            raise DamagedCheckpoint(f"{folder}: the bytes of {name} changed since it was written")
    return dict(manifest)


def load_weights(folder: Path, manifest: State) -> dict[str, torch.Tensor]:
    """The model's tensors by name and whole, whoever wrote them; tied ones restored from the manifest."""
    if (folder / SHARDS_FOLDER).is_dir():
        weights = read_weights(folder / SHARDS_FOLDER)
    else:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    for alias, name in manifest["aliases"].items():
        weights[alias] = weights[name]
    return weights


def load_state(folder: Path) -> State:
    """Everything but the weights, on the CPU and whole, without unpickling any code."""
    state = dict(torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True))
    shards = folder / SHARDS_FOLDER
    return dict(put_together(state, shards)) if shards.is_dir() else state


def checkpoint_folders(parent: Path, kind: Kind = "step") -> list[Path]:
    """The checkpoint folders in `parent`, oldest step first; unfinished ones (`.partial`) are not among them."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if path.is_dir() and re.fullmatch(rf"{kind}_\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_folder(parent: Path, step: int, kind: Kind = "step") -> Path:
    """Where the checkpoint of this update goes; the zeros let names sort by step."""
    return parent / f"{kind}_{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The number of updates in a checkpoint, from its folder's name."""
    return int(folder.name.rpartition("_")[2])


def newest_complete(parent: Path, kind: Kind = "step") -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint in `parent`, or None, and one line for each newer damaged one passed over."""
    passed_over: list[str] = []
    for folder in reversed(checkpoint_folders(parent, kind)):
        try:
            read_manifest(folder)
        except DamagedCheckpoint as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over


def is_disk_full(error: OSError) -> bool:
    """Whether writing failed for want of room: disk, quota or file-size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _without_aliases(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each storage once, contiguous, and {other name: kept name} for tensors that are the same one (tied weights)."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    name_of: dict[tuple[object, ...], str] = {}
    for name, tensor in weights.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in name_of:
            aliases[name] = name_of[place]
        else:
            name_of[place] = name
            kept[name] = tensor.detach().contiguous()
    return kept, aliases


def save_state(state: State, path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's zip writer reports a failed write without its errno
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise OSError(errno.ENOSPC, f"could not write {path.name}: {error}") from error
        raise


def tensor_bytes(tree: object) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(tensor_bytes(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(tensor_bytes(value) for value in tree)
    return 0


def require_room(parent: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(parent).free
    needed_bytes += needed_bytes // 50 + 1_000_000  # headers, names and the manifest
    if free_bytes < needed_bytes:
        raise OSError(errno.ENOSPC, f"needs {needed_bytes:,} bytes, {free_bytes:,} are free", str(parent))


def size_and_sum(path: Path) -> dict[str, int]:
    """Length and CRC-32: enough to notice damage, cheap enough (about 1 GB/s) to check before every resume."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            total = zlib.crc32(chunk, total)
    return {"bytes": path.stat().st_size, "crc32": total}


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
