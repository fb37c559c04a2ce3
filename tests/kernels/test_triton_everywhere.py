"""Without a GPU: all tests of kernels run under Triton's interpreter, and all kernels compile for several cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank_train.kernels.dispatch import has_kernels, runs_kernel

ROOT = Path(__file__).resolve().parents[2]
TESTS_OF_KERNELS = sorted(file for file in Path(__file__).parent.glob("test_triton_*.py") if file != Path(__file__))


def run(arguments: list[str], tmp_path: Path, interpreted: bool) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton reads the variable when it is first imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.slow
def test_kernels_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = run(["-m", "pytest", *options, *map(str, TESTS_OF_KERNELS)], tmp_path, interpreted=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-2000:]


@pytest.mark.slow
def test_kernels_compile_for_every_card(tmp_path: Path) -> None:
    """A kernel that asks for more shared memory than the card has compiles all the same, and fails when launched."""
    pytest.importorskip("triton", reason="triton is not installed")
    result = run(["-m", "tests.kernels.compile_kernels"], tmp_path, interpreted=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-8000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["capability"] for row in rows} == {80, 89, 90}  # each with every kernel, which the program asserts
    assert not [row for row in rows if row["first"] and row["shared"] > row["limit"]]  # others are passed over then


def test_without_triton_everything_is_in_plain_torch() -> None:
    """As where it is not installed: the package imports, and its operations work."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lowrank_train.optim.stored\n"
        "from lowrank_train.kernels import adam_8bit, affine, blockwise\n"
        "values = torch.arange(300.0)\n"
        "blockwise.dequantize_blockwise(*blockwise.quantize_blockwise(values, signed=True), signed=True)\n"
        "affine.dequantize_affine(affine.quantize_affine(values, bits=4), (300,), bits=4)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_only_plain_tensors_on_a_card_go_to_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_kernels(torch.device("cpu")) and not has_kernels(torch.device("meta"))
    monkeypatch.setattr("lowrank_train.kernels.dispatch.has_kernels", lambda device: device.type == "cpu")
    plain, elsewhere = torch.zeros(3), torch.zeros(3, device="meta")
    assert runs_kernel(plain, None, torch.nn.Parameter(plain), plain.bfloat16())
    assert not runs_kernel(plain, plain.double())
    assert not runs_kernel(plain, elsewhere)
    assert not runs_kernel(plain.as_subclass(type("Fake", (torch.Tensor,), {})))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert not runs_kernel(plain)
