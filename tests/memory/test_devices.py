"""What is known of devices: peak speeds by whole names only, and memory that is really used."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from lowrank_train.memory.devices import (
    device_name,
    forget_memory_peak,
    memory_now_bytes,
    memory_peak_bytes,
    peak_bf16_flops,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_peaks_of_known_cards(name: str, tera: float) -> None:
    assert peak_bf16_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla T4", "", "H100"]
)
def test_no_figure_for_what_is_not_known(name: str) -> None:
    assert peak_bf16_flops(name) is None


def test_memory_of_the_process_follows_what_it_holds() -> None:
    before = memory_now_bytes(CPU)
    block = np.ones(100_000_000, dtype=np.uint8)
    held = memory_now_bytes(CPU) - before
    peak = memory_peak_bytes(CPU)
    assert 90_000_000 < held < 130_000_000
    assert peak >= before + 90_000_000
    del block
    assert memory_peak_bytes(CPU) >= peak - 4_000_000  # the kernel counts in batches
    assert device_name(CPU)


@pytest.mark.gpu
def test_memory_of_a_gpu_is_that_of_its_tensors() -> None:
    device = torch.device("cuda", 0)
    before = memory_now_bytes(device)
    block = torch.ones(1 << 20, device=device)
    assert memory_now_bytes(device) - before == block.numel() * 4
    assert memory_peak_bytes(device) >= memory_now_bytes(device)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_a_forgotten_peak_counts_from_now_on() -> None:
    """400 MB come and go, in one piece that the system takes back at once; half of it is room for everything else."""
    held = torch.ones(100_000_000)
    before = memory_peak_bytes(CPU)
    del held
    assert memory_peak_bytes(CPU) > before - 100_000_000
    forget_memory_peak(CPU)
    assert memory_now_bytes(CPU) * 0.99 <= memory_peak_bytes(CPU) < before - 200_000_000
