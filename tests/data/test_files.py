"""Names to lines: expansion, compression, clear errors, and remote files that are cut and go on where they were."""

from __future__ import annotations

import bz2
import gzip
import http.server
import io
import lzma
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank_train.config.errors import UserError
from lowrank_train.data import files
from lowrank_train.data.files import Truncated, expand, expand_braces, read_lines
from tests.local_server import LocalServer

LINES = [b"line %d %s\n" % (number, os.urandom(24).hex().encode()) for number in range(20_000)]


def test_braces() -> None:
    assert expand_braces("c4-train.{00008..00011}-of-01024.json.gz") == [
        f"c4-train.{number:05d}-of-01024.json.gz" for number in range(8, 12)
    ]
    assert expand_braces("a{0..1}/b{8..10}") == ["a0/b8", "a0/b9", "a0/b10", "a1/b8", "a1/b9", "a1/b10"]
    assert expand_braces("plain") == ["plain"]


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl.gz", "a.json", "notes.txt", "c.csv"):
        (tmp_path / name).write_text("x")
    options = {"key": "data.train", "source": "jsonl"}
    in_folder = [str(tmp_path / name) for name in ("a.json", "b.jsonl.gz")]
    assert expand([str(tmp_path)], **options) == in_folder
    assert expand([str(tmp_path)], key="data.train", source="text") == [str(tmp_path / "notes.txt")]
    assert expand([str(tmp_path / "*.json*")], **options) == in_folder
    monkeypatch.chdir(tmp_path)
    assert expand(["*.json"], **options) == [str(tmp_path / "a.json")]
    assert expand(["a.json", "hf://datasets/x/y/{1..2}.gz"], **options)[1:] == [
        "hf://datasets/x/y/1.gz",
        "hf://datasets/x/y/2.gz",
    ]
    # From the project's root when the current folder has no such file.
    (found,) = expand(["data/shakespeare/train.jsonl.gz"], **options)
    assert Path(found).is_absolute() and Path(found).exists()


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ([], "data.train is empty"),
        (["b.jsonl.gz"], "data.train: b.jsonl.gz names no file; did you mean bb.jsonl.gz?"),
        (["*.nothing"], r"data.train: \*.nothing names no file"),
        (["sub"], "has no file ending in .jsonl or .json or .ndjson .found: readme.txt"),
        (["{0..1}.json"], "data.train: 0.json names no file"),
    ],
)
def test_what_names_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str], message: str
) -> None:
    (tmp_path / "bb.jsonl.gz").write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "readme.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        expand(addresses, key="data.train", source="jsonl")


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.txt", bytes), ("a.gz", gzip.compress), ("a.bz2", bz2.compress), ("a.xz", lzma.compress), ("a.zst", None)],
)
def test_compression(tmp_path: Path, name: str, compress: object) -> None:
    content = b"".join(LINES)
    if compress is None:
        compress = pytest.importorskip("zstandard").compress
    assert callable(compress)
    packed = compress(content)
    path = tmp_path / name
    path.write_bytes(packed)
    assert list(read_lines(str(path))) == LINES
    assert list(read_lines(str(path), start=19_990)) == LINES[19_990:]
    if name != "a.txt":
        if name != "a.zst":  # whose reader takes any end for the end
            path.write_bytes(packed[: len(packed) // 2])
            with pytest.raises(Truncated):
                list(read_lines(str(path)))
        path.write_bytes(content)
        with pytest.raises(Truncated):
            list(read_lines(str(path)))


class FlakyServer(LocalServer):
    """An HTTP server whose answers fail by a script: with a status, or hanging up after so many bytes."""

    def __init__(self, content: bytes) -> None:
        self.script: list[str] = []
        self.requests = 0
        flaky = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._head(200, len(content))

            def _head(self, status: int, length: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()

            def do_GET(self) -> None:
                flaky.requests += 1
                fault = flaky.script.pop(0) if flaky.script else ""
                if fault.startswith("status "):
                    self._head(int(fault.split()[1]), 0)
                    return
                self._head(200, len(content))
                self.wfile.write(content[: int(fault.split()[1])] if fault else content)

        super().__init__(Handler)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    pytest.importorskip("aiohttp")
    flaky = FlakyServer(gzip.compress(b"".join(LINES)))
    yield flaky
    flaky.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


def test_a_cut_connection_goes_on_at_the_line_it_had_reached(
    server: FlakyServer, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server.script = ["cut 400000", "status 503", "status 429", "cut 600000"]
    assert list(read_lines(f"{server.address}/a.json.gz", start=17)) == LINES[17:]
    assert waits[:3] == [1.0, 2.0, 4.0] and len(waits) == 4
    assert "next attempt in 4 s" in caplog.text


def test_the_wait_starts_over_after_progress(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """Streams that break after a given number of lines: how much arrives of a real cut connection, timing decides."""

    class Breaking(io.BytesIO):
        left = 0

        def __next__(self) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise ConnectionResetError
            return super().__next__()

    lines_each = [5, 0, 0, 9, 100]

    def open_breaking(address: str, revision: str | None) -> Breaking:
        stream = Breaking(b"".join(LINES[:30]))
        stream.left = lines_each.pop(0)
        return stream

    monkeypatch.setattr(files, "_open", open_breaking)
    assert list(read_lines("flaky://a", start=2)) == LINES[2:30]
    assert waits == [1.0, 2.0, 4.0, 1.0]


def test_a_server_that_stays_away(server: FlakyServer, waits: list[float]) -> None:
    server.script = ["cut 400000", *["status 503"] * 20]
    with pytest.raises(UserError, match=r"cannot be read past line \d+ after 8 attempts"):
        list(read_lines(f"{server.address}/a.json.gz", key="data.train"))
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(("status", "message"), [(404, "does not exist"), (403, "refuses"), (401, "log in .HF_TOKEN")])
def test_what_waiting_does_not_cure(server: FlakyServer, waits: list[float], status: int, message: str) -> None:
    server.script = [f"status {status}"] * 5
    with pytest.raises(UserError, match=f"data.train.*{message}"):
        list(read_lines(f"{server.address}/a.json.gz", key="data.train"))
    assert waits == []


def test_offline_is_named() -> None:
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set .*data=c4_local"):
        list(read_lines("hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz", revision="1588ec4"))


FAKE_HUB = """
import gzip, http.server, json, os, sys
from tests.local_server import LocalServer
LINES = [b"line %d %s\\n" % (n, os.urandom(24).hex().encode()) for n in range(20000)]
content = gzip.compress(b"".join(LINES))
faults, asked = ["cut", "503", "cut"], []
class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass
    def answer(self, body, status=200, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        asked.append(self.path)
        if "/tree/" in self.path:
            return self.answer(json.dumps([{"type": "file", "path": "en/a.json.gz", "size": 9, "oid": "x"}]).encode())
        if self.path.startswith("/api/"):
            return self.answer(json.dumps({"id": "allenai/c4", "sha": "1588ec4"}).encode())
        first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        rest = content[first:]
        fault = faults.pop(0) if faults else ""
        if fault == "503":
            return self.answer(b"", 503)
        self.answer(rest[:150000] if fault else rest, 206 if first else 200, len(rest))
os.environ |= {"HF_ENDPOINT": LocalServer(Hub).address, "HF_HOME": sys.argv[1], "HF_HUB_OFFLINE": "0"}
from lowrank_train.data.files import read_lines
assert list(read_lines("hf://datasets/allenai/c4/en/a.json.gz", start=5, revision="1588ec4")) == LINES[5:]
assert not faults
assert "/datasets/allenai/c4/resolve/1588ec4/en/a.json.gz" in asked, asked
"""


def test_the_hub_is_read_at_the_pinned_revision(tmp_path: Path) -> None:
    """Through huggingface_hub itself, against a server that speaks as much of the hub's language as is needed."""
    command = [sys.executable, "-c", FAKE_HUB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
