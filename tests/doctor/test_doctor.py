"""The doctor says a line for each part, whatever is broken, and its exit code says whether training can go."""

from __future__ import annotations

import http.server
import importlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_train.cli import main
from lowrank_train.config.schema import RunConfig
from lowrank_train.doctor import command, machine
from lowrank_train.doctor.finding import Finding
from lowrank_train.memory import host
from tests.local_server import LocalServer

Patch = pytest.MonkeyPatch


@pytest.fixture
def hub(monkeypatch: Patch) -> Iterator[str]:
    """A server on this machine that answers 403, as some proxies do."""

    class Forbidden(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = LocalServer(Forbidden)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server.address
    server.close()


def only(findings: Any) -> Finding:
    """The single one."""
    [finding] = list(findings)
    return finding


def test_this_machine_can_train(hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What runs the tests has all that training needs, and every part has its line."""
    words = ["doctor", f"output_dir={tmp_path}/runs"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = [line.split()[1] for line in lines]
    expected = ("python", "torch", "packages", "wandb", "cuda", "cpu", "threads", "OMP_WAIT_POLICY", "disk", "network")
    assert set(expected) <= set(parts) and "slurm" in parts
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    assert main([*words, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert [finding["part"] for finding in found["findings"]] == parts


def test_a_torch_that_does_not_import_is_one_line(
    hub: str, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file\nmore")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.delitem(sys.modules, "torch")
    assert main(["doctor", f"output_dir={tmp_path}"]) == 1
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("fault")]
    assert line.split()[1] == "torch" and "libcudart.so.13: cannot open" in line and "pip install 'torch>=2.1" in line
    assert "nothing more is known without torch" in out and "disk" in out


def test_a_probe_that_crashes_is_a_line_and_what_it_had_found_stays(monkeypatch: Patch) -> None:
    def half(_: RunConfig) -> Iterator[Finding]:
        yield Finding("half", "ok", "found")
        raise ZeroDivisionError

    def whole(_: RunConfig) -> Iterator[Finding]:
        yield Finding("whole", "ok", "found")

    for needed, verdict in ((True, "fault"), (False, "note")):
        monkeypatch.setattr(command, "PROBES", {"half": (half, needed), "whole": (whole, True)})
        findings = command.examined(RunConfig())
        assert [(f.part, f.verdict) for f in findings] == [("half", "ok"), ("half", verdict), ("whole", "ok")]
        assert "ZeroDivisionError" in findings[1].found
        assert command.doctor(RunConfig()) == int(needed)


@pytest.mark.parametrize(
    ("free_gb", "verdict"), [(100.0, "ok"), (5.0, "note"), (0.1, "fault")], ids=["room", "little", "none"]
)
def test_disk(tmp_path: Path, monkeypatch: Patch, free_gb: float, verdict: str) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free_gb * 10**9)))
    found = only(machine.disk(RunConfig(output_dir=str(tmp_path / "not" / "yet" / "there"))))
    assert found.verdict == verdict and f"(in {tmp_path})" in found.found
    assert ("output_dir=" in found.fix) == (verdict != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: Patch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    found = only(machine.disk(RunConfig(output_dir=str(tmp_path))))
    assert found.verdict == "fault" and "Read-only file system" in found.found and "output_dir=" in found.fix


def test_the_hub_answers_even_where_it_forbids(hub: str) -> None:
    found = only(machine.network(RunConfig()))
    assert found.verdict == "ok" and hub in found.found


def test_no_network_is_fine_and_said(monkeypatch: Patch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        found = only(machine.network(RunConfig()))
    assert found.verdict == "note" and "refused" in found.found and "HF_HUB_OFFLINE=1" in found.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(machine.network(RunConfig())).verdict == "ok"


def test_a_name_server_that_hangs_is_not_waited_for(monkeypatch: Patch) -> None:
    released = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        released.wait(60)
        raise OSError("nobody waits any more")

    monkeypatch.setattr(machine.urllib.request, "urlopen", hang)
    monkeypatch.setattr(machine, "HUB_SEC", 0.05)
    began = time.monotonic()
    assert machine.unreachable("https://huggingface.co") == "nothing within 0.05 s"
    assert time.monotonic() - began < 30
    released.set()


def fake_torch(*, built: str | None, available: bool, capability: tuple[int, int] = (8, 9), free: float = 1.0) -> Any:
    """As much of torch as the probes look at; products are right, and CUDA does not start unless it is available."""

    class Ones:
        def __matmul__(self, other: Ones) -> Ones:
            return self

        def sum(self) -> Ones:
            return self

        def item(self) -> float:
            return 64.0**3

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    cuda = SimpleNamespace(
        is_available=lambda: available,
        init=init,
        device_count=lambda: 1,
        get_device_capability=lambda _: capability,
        get_device_name=lambda _: "NVIDIA GeForce RTX 4090",
        mem_get_info=lambda _: (int(free * 24 * 2**30), 24 * 2**30),
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=built), cuda=cuda, ones=lambda *_, **__: Ones())


@pytest.mark.parametrize(
    ("driver", "built", "available", "verdict", "words"),
    [
        ("", None, False, "note", "no NVIDIA driver: training runs on the CPU"),
        ("535.129.03", None, False, "fault", "NVIDIA driver 535.129.03, but torch is built without CUDA"),
        ("470.57.02", "12.8", False, "fault", "does not start: The NVIDIA driver on your system is too old"),
        ("570.86.15", "12.8", True, "ok", "12.8 in torch, NVIDIA driver 570.86.15"),
    ],
    ids=["no gpu", "cpu build", "old driver", "all well"],
)
def test_cuda(
    tmp_path: Path, monkeypatch: Patch, driver: str, built: str | None, available: bool, verdict: str, words: str
) -> None:
    file = tmp_path / "version"
    if driver:
        file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue 10:00:00 UTC 2026\nGCC 12.2.0")
    monkeypatch.setattr(machine, "DRIVER", file)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "torch", fake_torch(built=built, available=available))
    found = list(machine.cuda(RunConfig()))
    assert (found[0].verdict, [f.part for f in found[1:]]) == (verdict, ["triton"] if available else [])
    assert words in found[0].found and bool(found[0].fix) == (verdict == "fault")


@pytest.mark.parametrize(
    ("capability", "free", "verdict", "words"),
    [
        ((8, 9), 1.0, "ok", "RTX 4090, 24.0 GiB, capability 8.9, bf16"),
        ((7, 5), 1.0, "note", "no bf16; use precision=fp32"),
        ((8, 9), 0.5, "note", "only 12.0 GiB are free"),
    ],
)
def test_gpu(monkeypatch: Patch, capability: tuple[int, int], free: float, verdict: str, words: str) -> None:
    torch = fake_torch(built="12.8", available=True, capability=capability, free=free)
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = only(machine.gpus(RunConfig()))
    assert found.verdict == verdict and words in found.line()


def test_a_gpu_that_torch_has_no_kernels_for(monkeypatch: Patch) -> None:
    def ones(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    torch = fake_torch(built="12.8", available=True)
    torch.ones = ones
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = only(machine.gpus(RunConfig()))
    assert found.verdict == "fault" and found.found.endswith("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("environment", "tools", "verdict", "words"),
    [
        ({}, (), "ok", "none on this machine"),
        ({}, ("srun", "sbatch"), "ok", "not in a job; srun and sbatch found"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, ("srun",), "ok", "in job 7, 4 tasks"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, ("srun",), "note", "of 4 tasks, not started by srun"),
    ],
)
def test_slurm(
    monkeypatch: Patch, environment: dict[str, str], tools: tuple[str, ...], verdict: str, words: str
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.shutil, "which", lambda tool: f"/usr/bin/{tool}" if tool in tools else None)
    found = only(machine.slurm(RunConfig()))
    assert found.verdict == verdict and words in found.found


def test_threads_that_are_too_many_or_spin(monkeypatch: Patch) -> None:
    monkeypatch.setattr(host, "processors", lambda: 2.0)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 64))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cpu, threads, policy = machine.cpu(RunConfig())
    assert cpu.found.startswith("2 processors, ")
    assert threads.verdict == policy.verdict == "note"
    assert "OMP_NUM_THREADS=2" in threads.fix and "OMP_WAIT_POLICY=passive" in policy.fix


def test_a_container_has_what_its_limits_say(tmp_path: Path, monkeypatch: Patch) -> None:
    """Control groups, version 2: half a processor, and memory half used, half of that by caches that can go."""
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert host.processors() == len(os.sched_getaffinity(0))
    total, free = host.main_memory_bytes()
    assert 0 < free < total
    gib = 2**30
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{gib // 8}\n")
    (tmp_path / "memory.current").write_text(f"{gib // 16}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {gib // 32}\nactive_file 7\n")
    assert host.processors() == 0.5
    assert host.main_memory_bytes() == (gib // 8, gib // 16 + gib // 32)
    for name, text in (("cpu.max", "max 100000\n"), ("memory.max", "max\n")):
        (tmp_path / name).write_text(text)
    assert host.processors() == len(os.sched_getaffinity(0))
    assert host.main_memory_bytes()[0] == total
