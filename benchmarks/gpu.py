"""Everything that needs a GPU: kernels beside published code and beside the card's limits, 7B runs under a memory cap.

    .venv/bin/pip install --no-deps galore-torch==1.0 bitsandbytes      (for the published side of the projected step)
    .venv/bin/python -m benchmarks.gpu                                  (all parts, or --parts with their names)

Each part writes benchmarks/results/gpu_<part>-<device>.json with device, driver, torch, triton, date and commit.
Without a card it says so and ends with code 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_kernels, gpu_runs
from benchmarks.rows import write_rows

Rows = list[dict[str, Any]]
PARTS: dict[str, Callable[[], Rows]] = {
    "projected_step": gpu_kernels.projected_steps,
    "layers": gpu_kernels.layers,
    "codes": gpu_kernels.codes,
    "memory": gpu_runs.plan_against_measured,
    "recipes": gpu_runs.recipes_under_caps,
}


def surroundings() -> dict[str, Any]:
    """What the numbers depend on beside the device, torch and the date, which every row has anyway."""
    driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    commit = output(["git", "rev-parse", "HEAD"])
    changed = output(["git", "status", "--porcelain", "--untracked-files=no"])
    return {
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "triton": None if importlib.util.find_spec("triton") is None else importlib.metadata.version("triton"),
        "commit": f"{commit} with changes" if commit and changed else commit,
    }


def output(command: list[str]) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs an NVIDIA GPU, and torch finds none; nothing was measured", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    where = surroundings()
    for part in arguments.parts:
        rows = PARTS[part]()
        for row in rows:
            print(row, flush=True)
        print("written to", write_rows(f"gpu_{part}", [where | row for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
