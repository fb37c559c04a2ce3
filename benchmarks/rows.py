"""What every benchmark shares: interleaved timing, and rows of results with device, date and versions."""

from __future__ import annotations

import datetime
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


def interleaved_median_sec(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each action; the actions take turns, so that a busy moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for name in actions:
        actions[name]()  # the first call allocates
    for _ in range(repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


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
    device = "".join(c if c.isalnum() else "-" for c in where["device"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}-{device}.json"
    path.write_text(json.dumps([where | row for row in rows], indent=1) + "\n")
    return path
