"""What is known about accelerators (peak bf16 speed) and what a process uses of their memory, or of main memory."""

from __future__ import annotations

import contextlib
import gc
import re
import resource
import sys
from pathlib import Path

import psutil
import torch

# Dense bf16 FLOP/s with fp32 accumulation, by the name the driver reports. Vendors like to print the figure for 2:4
# sparsity, which is twice as much; these are the dense ones. A name that is not matched whole (laptop parts, MIG
# slices) has no entry on purpose: no figure is better than a wrong one.
PEAK_BF16_FLOPS: tuple[tuple[str, float, str], ...] = (
    (r"NVIDIA B200", 2250e12, "NVIDIA DGX B200 datasheet (36 PFLOP/s bf16 sparse over 8 GPUs)"),
    (r"NVIDIA H200 NVL", 835.5e12, "NVIDIA H200 datasheet (1,671 TFLOP/s sparse)"),
    (r"NVIDIA H200", 989.5e12, "NVIDIA H200 datasheet (1,979 TFLOP/s sparse)"),
    (r"NVIDIA GH200 .*", 990e12, "NVIDIA GH200 datasheet"),
    (r"NVIDIA H100 NVL", 835.5e12, "NVIDIA H100 datasheet (1,671 TFLOP/s sparse)"),
    (r"NVIDIA H100 PCIe", 756.5e12, "NVIDIA H100 datasheet (1,513 TFLOP/s sparse)"),
    (r"NVIDIA H100 80GB HBM3", 989.5e12, "NVIDIA H100 datasheet (1,979 TFLOP/s sparse)"),
    (r"NVIDIA A100.*", 312e12, "NVIDIA A100 datasheet"),
    (r"NVIDIA A40", 149.7e12, "NVIDIA A40 datasheet"),
    (r"NVIDIA A30", 165e12, "NVIDIA A30 datasheet"),
    (r"NVIDIA A10", 125e12, "NVIDIA A10 datasheet"),
    (r"NVIDIA A10G", 70e12, "NVIDIA A10G specification"),
    (r"NVIDIA L40S", 362.05e12, "NVIDIA L40S datasheet"),
    (r"NVIDIA L40", 181.05e12, "NVIDIA L40 datasheet"),
    (r"NVIDIA L4", 121e12, "NVIDIA L4 datasheet (242 TFLOP/s sparse)"),
    (r"NVIDIA RTX A6000", 154.8e12, "NVIDIA Ampere GA102 whitepaper, table 5"),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2e12, "NVIDIA Ada GPU architecture whitepaper"),
    (r"NVIDIA GeForce RTX 3090", 71e12, "NVIDIA Ampere GA102 whitepaper, table 9"),
    (r"NVIDIA GeForce RTX 3090 Ti", 80e12, "NVIDIA Ada GPU architecture whitepaper, table 2"),
    (r"NVIDIA GeForce RTX 4080", 97.5e12, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    (r"NVIDIA GeForce RTX 4090", 165.2e12, "NVIDIA Ada GPU architecture whitepaper, table 2"),
    (r"NVIDIA GeForce RTX 5090", 209.5e12, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the card with this name as `torch.cuda.get_device_name` gives it; None when not known."""
    for pattern, flops, _ in PEAK_BF16_FLOPS:
        if re.fullmatch(pattern, device_name) and "MIG" not in device_name:
            return flops
    return None


def device_name(device: torch.device) -> str:
    """The name of the card, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return device.type


def memory_now_bytes(device: torch.device) -> int:
    """Bytes in use: tensors on a CUDA device, the process's resident memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def memory_peak_bytes(device: torch.device) -> int:
    """The largest such use since the process began, or since it was last forgotten."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's ru_maxrss where it can be helped: a child process inherits its parent's peak there.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), flags=re.MULTILINE) if status.exists() else None
    if found:
        return int(found.group(1)) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes on Linux, bytes on macOS (getrusage(2))
    return usage if sys.platform == "darwin" else usage * 1024


def forget_memory_peak(device: torch.device) -> None:
    """Let the peak count from now on, where the system can: main memory's alone on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def free_unused(device: torch.device) -> None:
    """Give back what nobody uses any more, objects that hold each other included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
