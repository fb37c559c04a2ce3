"""Sums over all that a run holds, to say whether two of them are the same to the last bit without keeping both."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_train.checkpoint_shards import own_part
from lowrank_train.train.module import RunModule

Fingerprints = Mapping[str, int]
"""Name of a tensor or number -> CRC-32 of its bytes, as checkpoints use it against damage."""


def fingerprints(module: RunModule) -> Fingerprints:
    """Of weights, buffers, optimizer state and torch's random generator on this rank."""
    held = {
        "weights": module.model.state_dict(keep_vars=True),
        "state": module.optimizer.state_dict()["state"],
        "generator": torch.get_rng_state(),
    }
    found: dict[str, int] = {}
    _add(held, "", found)
    return found


def differing(first: Fingerprints, second: Fingerprints) -> list[str]:
    """The names that one of them lacks or has otherwise."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _add(node: Any, path: str, found: dict[str, int]) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            _add(value, f"{path} {key}".strip(), found)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            _add(value, f"{path} {number}".strip(), found)
    elif isinstance(node, Tensor):
        raw = own_part(node).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found[path] = zlib.crc32(raw.numpy().data, zlib.crc32(f"{node.dtype} {tuple(node.shape)}".encode()))
    else:
        found[path] = zlib.crc32(repr(node).encode())
