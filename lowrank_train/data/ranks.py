"""What the ranks of a run agree on before they read: one asks a hub what there is, and all see the same files."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.documents import Source, check_readable, open_source
from lowrank_train.data.files import Listing, is_remote, list_remote
from lowrank_train.data.tokenizer import Tokenizer


def open_for_ranks(data: DataConfig, split: str, tokenizer: Tokenizer, world_size: int) -> Source:
    """`open_source` with at least one readable document, on every rank of the process group at once if there is one.

    The first rank lists remote files and looks into them, and tells the others; files on disks are looked at by every
    rank, and have to be the same everywhere.

    Raises:
        UserError: on all ranks alike, for what one of them found, and where files differ between ranks.
    """
    key = f"data.{split}"
    if not (world_size > 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() == world_size):
        alone = open_source(data, split, tokenizer)
        check_readable(alone, key=key)
        return alone
    addresses = data.train if split == "train" else data.validation
    listing = _listed_by_the_first(addresses, key, data)
    source: Source | None = None
    faults: list[str] = []
    try:
        source = open_source(data, split, tokenizer, listing)
        if dist.get_rank() == 0 or not is_remote(source.files[0]):
            check_readable(source, key=key)
    except UserError as error:
        faults = error.faults
    _agree(source, faults, key)
    assert source is not None, "else there were faults"
    return source


def _listed_by_the_first(addresses: list[str], key: str, data: DataConfig) -> Listing:
    """What remote globs name, asked for once; nothing is sent where there is none."""
    if data.source == "tokens" or not any(is_remote(address) and "*" in address for address in addresses):
        return {}
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = list_remote(addresses, key=key, revision=data.revision)
        except UserError as error:
            box[1] = error.faults
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    found: Listing = box[0]
    return found


@dataclass(frozen=True)
class _View:
    """What a rank tells the others: little, for there may be thousands of ranks and of files."""

    host: str
    faults: list[str]
    files: int
    digest: str


def _agree(source: Source | None, faults: list[str], key: str) -> None:
    """UserError on every rank if one has a fault, or sees other files than the first."""
    lines = [] if source is None else source.seen()
    mine = _View(socket.gethostname(), faults, len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest())
    views = _gathered(mine)
    if any(view.faults for view in views):
        raise UserError(list(dict.fromkeys(_of_ranks(views, fault) for view in views for fault in view.faults)))
    others = [rank for rank, view in enumerate(views) if view.digest != views[0].digest]
    if not others:
        return
    first: list[Any] = [lines]
    dist.broadcast_object_list(first, src=0)
    differences = _gathered(_difference(lines, first[0]))
    raise UserError(
        [
            f"{key}: rank {rank} on {views[rank].host} sees other files than rank 0 on {views[0].host}: "
            f"{differences[rank]}; copy the corpus anew, or put it where all nodes read the same disk"
            for rank in others
        ]
    )


def _of_ranks(views: list[_View], fault: str) -> str:
    """The fault, with who has it where not all have."""
    ranks = [rank for rank, view in enumerate(views) if fault in view.faults]
    if len(ranks) == len(views):
        return fault
    hosts = ", ".join(dict.fromkeys(views[rank].host for rank in ranks))
    some = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{fault} (found by rank {some} of {len(views)}, on {hosts})"


def _difference(mine: list[str], first: list[str]) -> str:
    """The first line in which two views differ."""
    for here, there in zip(mine, first, strict=False):
        if here != there:
            return f"{here}, there {there}"
    return f"{len(mine)} files, there {len(first)}"


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
