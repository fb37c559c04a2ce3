"""Checkpoints of a model that lies in shards: written by all ranks together, read by each rank for itself."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lowrank_train.checkpoint import (
    MANIFEST_FILE,
    PARTIAL_SUFFIX,
    STATE_FILE,
    WEIGHTS_FILE,
    State,
    complete,
    fsync,
    is_disk_full,
    read_manifest,
    require_room,
    save_state,
    size_and_sum,
    tensor_bytes,
)
from lowrank_train.checkpoint_shards import (
    SHARDS_FOLDER,
    WEIGHTS,
    described_shards,
    joined,
    put_together,
    read_shards,
    take_apart,
    write_shards,
)
from lowrank_train.optim.owners import rows_of

OPTIMIZER = "optimizer_states"  # Lightning's key; its tensors lie in the shards as the weights do


def save_sharded_folder(folder: Path, weights: dict[str, Tensor], state: State, facts: State) -> None:
    """As save_checkpoint_folder, called by all ranks at once, each with its rows and with what it alone has.

    Of `state` it is the first rank's that is kept, but for the optimizer's, which is put together from all. A disk
    without room on one rank is an OSError on every one.
    """
    partial, rank = folder.with_name(folder.name + PARTIAL_SUFFIX), dist.get_rank()
    kept, aliases = _without_aliases(weights)
    tensors = {WEIGHTS + name: tensor for name, tensor in kept.items()}
    optimizers = _gathered(take_apart(state.get(OPTIMIZER, []), OPTIMIZER, tensors))
    own = [one.to_local() if isinstance(one, DTensor) else one for one in tensors.values()]
    needed_bytes = sum(_gathered(tensor_bytes(own)))

    def begin() -> None:
        if rank != 0:
            return
        if partial.exists():
            shutil.rmtree(partial)
        (partial / SHARDS_FOLDER).mkdir(parents=True)
        require_room(partial, needed_bytes)
        rest = {key: value for key, value in state.items() if key != OPTIMIZER}
        save_state(
            rest | {OPTIMIZER: [joined(list(parts)) for parts in zip(*optimizers, strict=True)]}, partial / STATE_FILE
        )

    def finish() -> None:
        if rank != 0:
            return
        files = {name: size_and_sum(partial / name) for name in (STATE_FILE,)} | {
            f"{SHARDS_FOLDER}/{name}": found for part in sums for name, found in part.items()
        }
        manifest = json.dumps({**facts, "aliases": aliases, "files": files}, indent=2) + "\n"
        (partial / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
        for path in (partial / STATE_FILE, partial / MANIFEST_FILE, partial / SHARDS_FOLDER, partial):
            fsync(path)
        complete(partial, folder)

    try:
        _all_together(begin)
        _all_together(lambda: write_shards(partial / SHARDS_FOLDER, tensors))
        sums = _gathered(_own_sums(partial / SHARDS_FOLDER))
        _all_together(finish)
    except OSError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def load_own(folder: Path, like: Mapping[str, Tensor], mesh: DeviceMesh) -> tuple[dict[str, Tensor], State]:
    """(weights, state) of a checkpoint, whoever wrote it, with this rank's rows of what is sharded in `like`.

    The optimizer's tensors come in rows where they were saved so, the others whole; those of one process lie in a
    mapped file, of which only what is used is read.
    """
    manifest = read_manifest(folder)
    shards = folder / SHARDS_FOLDER
    aliases: dict[str, str] = manifest["aliases"]

    def rows(shape: Size, dtype: torch.dtype) -> Tensor:
        return _of_rows(torch.empty((own_rows(shape[0], mesh), *shape[1:]), dtype=dtype), shape, mesh)

    if shards.is_dir():
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        state = put_together(state, shards, rows)
        weights: dict[str, Tensor] = {}
        for name, (shape, dtype) in described_shards(shards).items():
            if name.startswith(WEIGHTS):
                wanted = like.get(name.removeprefix(WEIGHTS))
                in_rows = isinstance(wanted, DTensor) and wanted.shape == shape
                weights[name] = rows(shape, dtype) if in_rows else torch.empty(shape, dtype=dtype)
        read_shards(shards, weights)
        weights = {name.removeprefix(WEIGHTS): tensor for name, tensor in weights.items()}
    else:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
        weights = _rows_of_file(folder / WEIGHTS_FILE, like, mesh)
    for alias, name in aliases.items():
        weights[alias] = weights[name]
    return weights, dict(state)


def own_rows(length: int, mesh: DeviceMesh) -> int:
    """How many rows of so many lie on this rank."""
    part = rows_of(length, mesh.get_local_rank(), mesh.size())
    return part.stop - part.start


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether some of them lie in pieces on several ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _rows_of_file(file: Path, like: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            piece, wanted = opened.get_slice(name), like.get(name)
            shape = Size(piece.get_shape())
            if isinstance(wanted, DTensor) and wanted.shape == shape:
                own = rows_of(shape[0], mesh.get_local_rank(), mesh.size())
                found[name] = _of_rows(piece[own.start : own.stop], shape, mesh)
            else:
                found[name] = opened.get_tensor(name)
    return found


def _of_rows(local: Tensor, shape: Size, mesh: DeviceMesh) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _without_aliases(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and {other name: kept name} for those that are the same one, as the first rank finds them."""
    name_of: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (local.untyped_storage().data_ptr(), local.storage_offset(), local.shape, local.stride(), local.dtype)
        if local.numel() and place in name_of:
            aliases[name] = name_of[place]
        else:
            name_of[place] = name
    aliases = _gathered(aliases)[0]
    return {name: tensor.detach() for name, tensor in weights.items() if name not in aliases}, aliases


def _gathered(value: Any) -> list[Any]:
    """Of every rank, in their order, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _all_together(act: Callable[[], None]) -> None:
    """Do it, and fail on every rank where it fails on one: none is left waiting."""
    fault: BaseException | None = None
    try:
        act()
    except CheckpointException as error:  # torch's own, the same on all ranks
        fault = _disk_full_of(error)
    except Exception as error:  # noqa: BLE001  (raised again below, on all ranks)
        fault = error
    told = _gathered(None if fault is None else (isinstance(fault, OSError) and is_disk_full(fault), str(fault)))
    if fault is not None:
        raise fault
    for full, text in (one for one in told if one is not None):
        raise OSError(errno.ENOSPC, text) if full else RuntimeError(text)


def _disk_full_of(error: CheckpointException) -> BaseException:
    """The OSError behind a failure of torch's, where the disk is full; safetensors and zip writers say so as text."""
    for cause, _ in error.failures.values():
        if isinstance(cause, OSError) and is_disk_full(cause):
            return OSError(cause.errno, str(cause))
        if "No space left" in str(cause) or "PytorchStreamWriter" in str(cause):
            return OSError(errno.ENOSPC, str(cause))
    return error


def _own_sums(folder: Path) -> dict[str, dict[str, int]]:
    """Sums of this rank's share of the files, which it sees on their way to the disk."""
    mine = sorted(folder.iterdir())[dist.get_rank() :: dist.get_world_size()]
    for path in mine:
        fsync(path)
    return {path.name: size_and_sum(path) for path in mine}
