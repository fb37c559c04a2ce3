"""Whether the machine has the room for what comes later in a run: checkpoints on the disk, an export."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer
from lowrank_train.evaluate.loading import DTYPES
from lowrank_train.memory.host import main_memory_bytes
from lowrank_train.models import meta_model
from lowrank_train.report.units import format_bytes

MODELS_AT_ONCE = 3  # in main memory while logits are compared: the trained model, its plain form, what was read back
MARGIN = 1.05  # for all that is not weights


def room_for_checkpoints(checkpoint: Path, keep: int) -> tuple[str, str]:
    """(fault, fact) of the disk that `checkpoint` lies on and is about to leave: whether it holds `keep` of its size
    and one being written. An empty fault where it does."""
    size_bytes, count = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()), max(1, keep) + 1
    free_bytes = shutil.disk_usage(checkpoint).free + size_bytes
    size, free, fit = format_bytes(size_bytes), format_bytes(free_bytes), free_bytes // size_bytes
    if fit >= count:
        return "", f"{size}; {free} free for {count}"
    fewer = f"trainer.keep_checkpoints={fit - 1} or " if fit > 1 else ""
    return (
        f"{count} checkpoints of {size}, those of trainer.keep_checkpoints and one being written, do not fit the "
        f"{free} that are free; use {fewer}an output_dir with more room",
        "",
    )


def lacking_for_export(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> str:
    """What an export into `folder` lacks on this machine, in words; nothing where it has all."""
    dtype = DTYPES[config.precision.weights]
    model = meta_model(config.model, vocab_size=tokenizer.vocab_size, dtype=dtype)
    count = sum(param.numel() for param in model.parameters())
    on_disk = int(MARGIN * count * dtype.itemsize)
    # Where matrices have another form, its folding is compared in float32.
    in_memory = int(MARGIN * MODELS_AT_ONCE * count * (dtype.itemsize if config.strategy.weights is None else 4))
    for what, needed, free in (
        ("disk", on_disk, shutil.disk_usage(folder).free),
        ("main memory", in_memory, main_memory_bytes()[1]),
    ):
        if free < needed:
            return f"it needs {format_bytes(needed)} of {what}, {format_bytes(free)} are free: it would fail here"
    return ""
