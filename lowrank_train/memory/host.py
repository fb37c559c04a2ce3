"""What the machine has for this process, limits of its container included: processors and main memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2, as this process's container sees it


def processors() -> float:
    """Processors that this process may keep busy."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = float(len(affinity(0))) if affinity is not None else float(os.cpu_count() or 1)
    quota, _, period = _limit("cpu.max").partition(" ")
    return min(allowed, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else allowed


def main_memory_bytes() -> tuple[int, int]:
    """(all, free): bytes of main memory, what can be given up by caches counted as free."""
    memory = psutil.virtual_memory()
    limit, used = _limit("memory.max"), _limit("memory.current")
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= memory.total:
        return int(memory.total), int(memory.available)
    caches = [line.split()[1] for line in _limit("memory.stat").splitlines() if line.startswith("inactive_file ")]
    free = int(limit) - int(used) + sum(map(int, caches))
    return int(limit), min(free, int(memory.available))


def _limit(name: str) -> str:
    try:
        return (CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""
