"""The state of a library's optimizer for one tensor, as a flat dictionary of tensors and integers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_train.optim.transform import State

SEPARATORS = ".[]#"
"""a.b: the entry b of a dictionary a; a[0]: the first of a list; a#float: a is a float, kept as float64; a#list: its
length."""


def flatten(value: Any, path: str) -> State:
    """`value` below the key `path`. TypeError for what cannot be loaded safely, such as an object of some class."""
    if isinstance(value, Tensor):
        return {path: value.detach()}
    if value is None or isinstance(value, bool):
        return {f"{path}#none": 0} if value is None else {f"{path}#bool": int(value)}
    if isinstance(value, int):
        return {path: value}
    if isinstance(value, float):
        return {f"{path}#float": torch.tensor(value, dtype=torch.float64)}
    if type(value) in (list, tuple):
        flat: State = {f"{path}#{type(value).__name__}": len(value)}
        for index, item in enumerate(value):
            flat |= flatten(item, f"{path}[{index}]")
        return flat
    if isinstance(value, dict) and all(isinstance(key, str) and not set(key) & set(SEPARATORS) for key in value):
        flat = {} if value else {f"{path}#dict": 0}
        for key, item in value.items():
            flat |= flatten(item, f"{path}.{key}")
        return flat
    raise TypeError(f"{path.partition('.')[2] or path} is a {type(value).__name__}")


def unflatten(state: Mapping[str, Tensor | int], path: str) -> Any:
    """What `flatten` was given; {} where nothing lies below `path`."""
    for suffix in ("", "#none", "#bool", "#float", "#list", "#tuple", "#dict"):
        value = state.get(path + suffix)
        if value is None:
            continue
        if suffix == "":
            return value
        if suffix in ("#list", "#tuple"):
            items = [unflatten(state, f"{path}[{index}]") for index in range(int(value))]
            return items if suffix == "#list" else tuple(items)
        return {"#none": None, "#bool": bool(value), "#float": float(value), "#dict": {}}[suffix]
    names = dict.fromkeys(name_below(key, path) for key in state if key.startswith(f"{path}."))
    return {name: unflatten(state, f"{path}.{name}") for name in names}


def name_below(key: str, path: str) -> str:
    """The name that follows `path.` in a key."""
    name = key.removeprefix(f"{path}.")
    return name[: next((index for index, letter in enumerate(name) if letter in SEPARATORS), len(name))]
