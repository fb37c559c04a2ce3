"""Names of files to streams of lines: braces, globs, folders, compression, and remote files that resume after a cut."""

from __future__ import annotations

import difflib
import io
import itertools
import logging
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from lowrank_train.config.errors import UserError

log = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[2]
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_SUFFIXES = {"jsonl": _JSON_LINES, "chat": _JSON_LINES, "text": (".txt", ".text", ".md", ".utf8")}
READ_BYTES = 2**18  # asked of a remote file at a time
RETRIES = 8  # attempts in a row without one new line
FIRST_WAIT_SEC, LONGEST_WAIT_SEC = 1.0, 60.0  # doubled at every attempt: about three minutes in all
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


def is_remote(address: str) -> bool:
    """Whether `address` is opened through fsspec (`hf://`, `http://`, `s3://`, ...)."""
    return "://" in address


def find_local(path: str) -> Path | None:
    """The existing file or folder `path` means, from the current folder or else from the project's root."""
    given = Path(path).expanduser()
    return next((place for place in (given, PROJECT_ROOT / given) if place.exists()), None)


def did_you_mean(path: str) -> str:
    """`; did you mean X?` for the nearest name beside `path`, or nothing."""
    given = Path(path).expanduser()
    for folder in (given.parent, PROJECT_ROOT / given.parent):
        if folder.is_dir():
            near = difflib.get_close_matches(given.name, [entry.name for entry in folder.iterdir()], n=1)
            if near:
                return f"; did you mean {Path(path).parent / near[0]}?"
    return ""


def expand_braces(address: str) -> list[str]:
    """`a{08..11}b` gives a08b, a09b, a10b, a11b."""
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in _BRACES.findall(address)
    ]
    if not ranges:
        return [address]
    pattern = _BRACES.sub("\0", address)
    expanded = []
    for numbers in itertools.product(*ranges):
        parts = pattern.split("\0")
        expanded.append("".join(a + b for a, b in zip(parts, (*numbers, ""), strict=True)))
    return expanded


Listing = dict[str, list[str]]
"""Of addresses with a glob on a remote store, the files that it was found to name."""


def list_remote(addresses: list[str], *, key: str, revision: str | None) -> Listing:
    """Asks remote stores what the globs among `addresses` name. UserError for one that names nothing."""
    globs = [found for given in addresses for found in expand_braces(given) if is_remote(found) and "*" in found]
    return {address: _remote_glob(address, key, revision) for address in globs}


def expand(
    addresses: list[str], *, key: str, source: str, revision: str | None = None, listing: Listing | None = None
) -> list[str]:
    """The files `addresses` name, in order: braces and globs expanded, folders listed, relative paths found.

    Args:
        addresses: files, globs, folders, or addresses with `://`, each perhaps with `{00000..01023}`.
        key: the configuration key they come from, for messages.
        source: `jsonl` or `text`: which files of a folder are taken.
        revision: commit for `hf://` addresses that contain a glob.
        listing: what `list_remote` found for them; asked for where it is not given.

    Raises:
        UserError: an address names nothing.
    """
    if not addresses:
        raise UserError(f"{key} is empty: give at least one file, glob, folder or hf:// address")
    listing = list_remote(addresses, key=key, revision=revision) if listing is None else listing
    files: list[str] = []
    for address in (expanded for given in addresses for expanded in expand_braces(given)):
        if is_remote(address):
            files += listing.get(address, [address])
        elif (found := find_local(address)) is not None:
            files += _list_folder(found, key, source) if found.is_dir() else [str(found)]
        else:
            matches = _glob(Path(address).expanduser())
            if not matches:
                raise UserError(f"{key}: {address} names no file{did_you_mean(address)}")
            files += matches
    return files


def _glob(pattern: Path) -> list[str]:
    """Files that match, from the current folder or else from the project's root, by name."""
    for folder in (Path.cwd(), PROJECT_ROOT):
        anchor = Path(pattern.anchor) if pattern.is_absolute() else folder
        relative = str(pattern.relative_to(anchor)) if pattern.is_absolute() else str(pattern)
        if found := sorted(str(path) for path in anchor.glob(relative) if path.is_file()):
            return found
    return []


def _list_folder(folder: Path, key: str, source: str) -> list[str]:
    """Files of `folder` that look like `source`, by name."""
    wanted = _SUFFIXES[source]
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    taken = [name for name in names if Path(re.sub(r"\.(gz|bz2|xz|zst)$", "", name)).suffix in wanted]
    if not taken:
        there = ", ".join(names[:8]) or "nothing"
        raise UserError(f"{key}: folder {folder} has no file ending in {' or '.join(wanted)} (found: {there})")
    return [str(folder / name) for name in taken]


def _filesystem(address: str, revision: str | None) -> tuple[Any, str]:
    """The fsspec file system of `address` and the path in it; `hf://` is pinned to `revision`."""
    import fsspec  # type: ignore[import-untyped]

    if address.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        path = address.removeprefix("hf://")
        repository = re.match(r"(?:datasets/|spaces/)?[^/]+/[^/@]+", path)
        if repository and revision and "@" not in path:
            path = f"{repository[0]}@{revision}{path[repository.end() :]}"
        return HfFileSystem(), path
    filesystem, path = fsspec.core.url_to_fs(address)
    return filesystem, path


def _remote_glob(address: str, key: str, revision: str | None) -> list[str]:
    filesystem, path = _filesystem(address, revision)
    protocol = address.split("://", 1)[0]
    try:
        found = [f"{protocol}://{name}" if "://" not in name else name for name in sorted(filesystem.glob(path))]
    except Exception as error:
        if (fault := _explained(error, address, key)) is not None:
            raise fault from error
        raise
    if not found:
        raise UserError(f"{key}: {address} names no file")
    return found


def cached_copy(address: str, revision: str | None) -> Path | None:
    """The copy of an `hf://` file that `hf download` left in the local cache, if there is one."""
    parts = re.fullmatch(r"hf://(datasets/|spaces/)?([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", address)
    if not parts:
        return None
    from huggingface_hub import try_to_load_from_cache

    kind = {"datasets/": "dataset", "spaces/": "space", None: "model"}[parts[1]]
    found = try_to_load_from_cache(parts[2], parts[4], revision=parts[3] or revision, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def _decompress(raw: BinaryIO, name: str) -> BinaryIO:
    """`raw` as a stream of plain bytes; the compression is told by the name's ending."""
    import fsspec

    kind = _COMPRESSION.get(Path(name).suffix)
    if kind is None:
        return raw
    if kind not in fsspec.compression.compr:
        raise UserError(f"{name}: reading .zst files needs the package zstandard (pip install zstandard)")
    stream: Any = fsspec.compression.compr[kind](raw, mode="rb")
    return io.BufferedReader(stream) if kind == "zstd" else stream  # zstandard's reader has no lines


def _open(address: str, revision: str | None) -> BinaryIO:
    if is_remote(address):
        cached = cached_copy(address, revision)
        if cached is None:
            filesystem, path = _filesystem(address, revision)
            # Block size 0: one request for a whole shard, read as it comes, instead of one for every 5 MB.
            options = {"block_size": 0} if address.startswith(("hf://", "http://", "https://")) else {}
            raw: Any = io.BufferedReader(filesystem.open(path, "rb", **options), READ_BYTES)
            return _decompress(raw, address)
        return _decompress(cached.open("rb"), address)
    return _decompress(Path(address).open("rb"), address)


def _status(error: BaseException) -> int | None:
    """The HTTP status an error of httpx, huggingface_hub, requests or aiohttp carries."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _explained(error: Exception, address: str, key: str) -> UserError | None:
    """A remote fault that waiting does not cure, in the user's words."""
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    local = "use local shards (data=c4_local, or data.train=[...])"
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(
            f"{key}: {address} is on the hub, but HF_HUB_OFFLINE is set and the cache does not have it; "
            f"unset it, fetch the file first (hf download), or {local}"
        )
    if _status(error) in (401, 403):
        return UserError(f"{key}: the server refuses {address} ({error}); log in (HF_TOKEN), or {local}")
    if isinstance(error, FileNotFoundError | EntryNotFoundError | RepositoryNotFoundError) or _status(error) == 404:
        return UserError(f"{key}: {address} does not exist{' at data.revision' if address.startswith('hf') else ''}")
    return None


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: a cut or refused connection, a time-out, 429 or 5xx."""
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    # huggingface_hub 1 raises errors of httpx, 2 of httpx2; fsspec those of aiohttp.
    return isinstance(error, OSError | EOFError | zlib.error) or type(error).__module__.startswith(("httpx", "aiohttp"))


class Truncated(Exception):
    """A compressed file ended or broke before its end; what came before was good."""


def read_lines(address: str, *, start: int = 0, revision: str | None = None, key: str = "data") -> Iterator[bytes]:
    """Yields the lines of a file from line `start` (counted from 0) on, with their line ends.

    A remote file that stops half-way is opened again at the line it had reached, after a wait that doubles.

    Raises:
        Truncated: a compressed file is damaged here; every whole line before the damage has been yielded.
        UserError: a remote file does not exist, is refused, or stays unreachable.
    """
    line = start
    attempts, wait_sec = 0, FIRST_WAIT_SEC
    while True:
        reached = line
        try:
            with closing(_open(address, revision)) as stream:
                for raw in itertools.islice(stream, line, None):
                    yield raw
                    line += 1
            return
        except UserError:
            raise
        except Exception as error:
            # Remote stores raise many unrelated classes; what is not known to be transient is raised again.
            if not is_remote(address):
                if isinstance(error, EOFError | zlib.error) or _is_bad_archive(error):
                    raise Truncated(f"{type(error).__name__}: {error}") from error
                raise
            if (fault := _explained(error, address, key)) is not None:
                raise fault from error
            if not _is_transient(error):
                raise
            if line > reached:
                attempts, wait_sec = 0, FIRST_WAIT_SEC
            attempts += 1
            if attempts > RETRIES:
                raise UserError(
                    f"{key}: {address} cannot be read past line {line} after {RETRIES} attempts "
                    f"({type(error).__name__}: {error}); run the same command again to go on from the last checkpoint"
                ) from error
            log.warning("%s: %s at line %d; next attempt in %.0f s", address, type(error).__name__, line, wait_sec)
            time.sleep(wait_sec)
            wait_sec = min(2 * wait_sec, LONGEST_WAIT_SEC)


def _is_bad_archive(error: Exception) -> bool:
    """Whether `error` says that bytes are not what the ending of the file's name promised."""
    import gzip
    import lzma

    return (
        isinstance(error, gzip.BadGzipFile | lzma.LZMAError)
        or type(error).__name__ == "ZstdError"
        or (
            isinstance(error, OSError) and error.errno is None  # bz2: "Invalid data stream"
        )
    )
