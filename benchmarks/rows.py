"""What every benchmark shares: interleaved timing, and rows of results with device, date and versions."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved_median_sec(
    actions: dict[str, Callable[[], None]], repeats: int, prepare: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each action; the actions take turns, so that a busy moment of the machine hits all alike.

    `prepare` comes before each turn of all and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    prepare()
    for name in actions:
        actions[name]()  # the first call allocates
    for _ in range(repeats):
        prepare()
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_extra_bytes(action: Callable[[], None]) -> int:
    """The most memory that torch held during an action beyond what it held before."""
    gc.collect()  # what lies in reference cycles would be freed meanwhile, and make the action look cheaper
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    assert results is not None
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events)
    return max(held, default=0)


def machine() -> dict[str, Any]:
    """Where and when a row was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def cpu_name() -> str:
    """The processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def write_rows(benchmark: str, rows: list[dict[str, Any]]) -> Path:
    """Save the rows as benchmarks/results/<benchmark>-<device>.json, replacing an earlier run on the same device."""
    where = machine()
    RESULTS.mkdir(exist_ok=True)
    path = results_path(benchmark, where["device"])
    path.write_text(json.dumps([where | row for row in rows], indent=1) + "\n")
    return path


def earlier_rows(benchmark: str) -> list[dict[str, Any]]:
    """The rows that were saved on this device; saved again, each keeps the date and the load it was measured with."""
    path = results_path(benchmark, machine()["device"])
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def results_path(benchmark: str, device: str) -> Path:
    """benchmarks/results/<benchmark>-<device>.json."""
    return RESULTS / f"{benchmark}-{''.join(c if c.isalnum() else '-' for c in device.lower()).strip('-')}.json"
