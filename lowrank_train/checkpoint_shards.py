"""Tensors of a checkpoint that several processes hold in pieces: torch's distributed checkpoint, in safetensors.

torch's own files keep their table as a pickle, which runs code when it is read; the headers of safetensors hold the
same table, so that a checkpoint of several processes is as safe to open as that of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

SHARDS_FOLDER = "sharded"  # in the folder of the checkpoint
WEIGHTS = "weights/"  # before the names of the model's tensors; all others go by their place in the state
PLACE = "lies in shards at"  # the key of what stands in the state for a tensor

Described = tuple[Size, torch.dtype]


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Collective: each process writes its rows of DTensors; a plain tensor that several have, one of them writes."""
    import torch.distributed.checkpoint as dcp  # here and below: a second that only those pay who need it
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_shards(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill whole tensors, or this process's rows of DTensors, in place; no process waits for another."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(dict(into), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def described_shards(folder: Path) -> dict[str, Described]:
    """Name -> whole shape and dtype of all that is there."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (one.size, one.properties.dtype) for name, one in found.items()}  # type: ignore[union-attr]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors, whole."""
    wanted = {name: one for name, one in described_shards(folder).items() if name.startswith(WEIGHTS)}
    whole = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    read_shards(folder, whole)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in whole.items()}


def take_apart(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A copy of nested containers in which a note of its place stands for each tensor; these go into `tensors`."""
    from torch.distributed.tensor import DTensor

    if isinstance(tree, Tensor):
        tensors[path] = tree
        dtype = str(tree.dtype).removeprefix("torch.")
        return {PLACE: path, "rows": isinstance(tree, DTensor), "shape": list(tree.shape), "dtype": dtype}
    if isinstance(tree, dict):
        return {key: take_apart(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [take_apart(value, f"{path}/{number}", tensors) for number, value in enumerate(tree)]
    return tree


def joined(trees: list[Any]) -> Any:
    """What several processes have of the same nested dictionaries; where two have something, it is the same."""
    if not isinstance(trees[0], dict) or PLACE in trees[0]:
        return trees[0]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return {key: joined([tree[key] for tree in trees if key in tree]) for key in keys}


def put_together(tree: Any, folder: Path, empty_rows: Callable[[Size, torch.dtype], Tensor] | None = None) -> Any:
    """Undo `take_apart`, with the tensors read from `folder`.

    empty_rows: (whole shape, dtype) -> the DTensor that takes this process's rows of what was saved in rows; None: all
    tensors come whole.
    """
    into: dict[str, Tensor] = {}
    filled = _with_tensors(tree, into, empty_rows)
    if into:
        read_shards(folder, into)
    return filled


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows, its part of a parameter under ZeRO's stage 3, or all."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def whole_shape(tensor: Tensor) -> Size:
    """That of all parts together; ZeRO's stage 3 leaves a parameter empty while its parts lie on all devices."""
    found: Size = getattr(tensor, "ds_shape", tensor.shape)
    return found


def _with_tensors(tree: Any, into: dict[str, Tensor], empty_rows: Callable[[Size, torch.dtype], Tensor] | None) -> Any:
    if isinstance(tree, dict) and PLACE in tree:
        shape, dtype = Size(tree["shape"]), getattr(torch, tree["dtype"])
        in_rows = tree["rows"] and empty_rows is not None
        tensor = empty_rows(shape, dtype) if in_rows and empty_rows is not None else torch.empty(shape, dtype=dtype)
        into[tree[PLACE]] = tensor
        return tensor
    if isinstance(tree, dict):
        return {key: _with_tensors(value, into, empty_rows) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_tensors(value, into, empty_rows) for value in tree]
    return tree
