"""Which tiles a kernel runs with: measured on the card at first use, and kept on disk."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench


class Tiles(NamedTuple):
    """Sizes of a tile in the order of the kernel's, and with how many warps and stages of loads it is worked on."""

    sizes: tuple[int, ...]
    warps: int
    stages: int


Choices = dict[str, Tiles]
_known: dict[torch.device, Choices] = {}


def chosen(
    kernel: str,
    bucket: str,
    candidates: Sequence[Tiles],
    device: torch.device,
    changed: Sequence[Tensor],
    run: Callable[[Tiles, Sequence[Tensor]], object],
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> Tiles:
    """The quickest of the candidates for work of this kind.

    bucket: what the answer may depend on, such as dtypes and rounded sizes. changed: what the work changes in place, of
    which `run` gets copies here. seconds: how long a call takes; None: on the card, by triton.testing. Candidates
    should sum up in the same order, so that results do not depend on the choice. One that asks for more shared memory
    than the card has is passed over. The first serves where memory runs out while measuring, and where several
    processes train together, which must not choose each for itself.
    """
    if len(candidates) == 1 or device.type != "cuda":
        return candidates[0]
    if device not in _known:
        _known[device] = _read(choices_path(device))
    known, key = _known[device], f"{kernel} {bucket}"
    if known.get(key) not in candidates:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return candidates[0]
        try:
            copies = [tensor.clone() for tensor in changed]
            known[key] = _quickest(candidates, lambda tiles: run(tiles, copies), seconds or _on_card)
        except torch.OutOfMemoryError:
            return candidates[0]
        _write(choices_path(device), key, known[key])
    return known[key]


def rounded_up(size: int) -> int:
    """To a power of two: sizes that share a choice."""
    return 1 << max(0, size - 1).bit_length()


def choices_path(device: torch.device) -> Path:
    """A file for each kind of card and version of triton, in $LOWRANK_TRAIN_CACHE or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_train"
    folder = Path(os.environ.get("LOWRANK_TRAIN_CACHE") or default)
    card = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device).lower())
    return folder / f"tiles-{card}-triton-{triton.__version__}.json"


def _quickest(
    candidates: Sequence[Tiles], run: Callable[[Tiles], object], seconds: Callable[[Callable[[], object]], float]
) -> Tiles:
    times: dict[Tiles, float] = {}
    for tiles in candidates:
        try:
            times[tiles] = seconds(lambda tiles=tiles: run(tiles))  # type: ignore[misc]
        except OutOfResources:
            continue
    return min(times, key=times.__getitem__, default=candidates[0])


def _on_card(call: Callable[[], object]) -> float:
    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def _read(path: Path) -> Choices:
    """What is there; nothing where there is no file, or one that cannot be read."""
    try:
        stored = json.loads(path.read_text())
        return {key: Tiles(tuple(sizes), warps, stages) for key, (sizes, warps, stages) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, key: str, tiles: Tiles) -> None:
    """Add a choice to those of other processes; a folder that cannot be written to is done without."""
    together = _read(path) | {key: tiles}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(together, file, indent=1)
        Path(file.name).replace(path)  # whole or not at all
    except OSError:
        return
