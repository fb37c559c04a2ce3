"""Forward plus backward of reparametrised layers beside nn.Linear, with the memory that each needs to be trained.

    OMP_WAIT_POLICY=passive .venv/bin/python -m benchmarks.layer_time

The layers take turns on the same input and output gradient; a ratio is the median over the rounds of a layer's time to
the plain one's in the same round, and a CPU ratio that of the seconds that all threads computed, which other work on
the machine disturbs less, but which does not see threads that wait for each other. `peak` is the most that training one
layer holds: weights, buffers and Adam's two moments, and during forward and backward everything else (output,
gradients, temporaries), but not the input. Gradients are random: values do not change the time.
Rows of shapes and tokens that are not asked for stay in the results. OMP_WAIT_POLICY=passive is for a machine that is
not idle, where threads that spin while they wait slow everything down.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rows import earlier_rows, peak_extra_bytes, write_rows
from lowrank_train.nn.sltrain import SLTrainLinear
from lowrank_train.nn.sst import SSTLinear

SHAPES = [(512, 1376), (1376, 512), (2048, 5461), (5461, 2048)]  # out_features x in_features: LLaMA 60M's MLP and 1B's
TOKENS = [2048, 16384]
RANK = 128
SPARSE_SHARE = 0.03  # the published share of SLTrain at these sizes


def layers_of(rows: int, columns: int) -> dict[str, nn.Module]:
    """The plain layer and those made from it."""
    linear = nn.Linear(columns, rows, bias=False)
    return {
        "linear": linear,
        "sltrain": SLTrainLinear.from_linear(linear, rank=RANK, sp_ratio=SPARSE_SHARE),
        "sst": SSTLinear.from_linear(linear, rank=RANK),
    }


class Turn:
    """One layer's forward and backward, gradients made anew as an optimizer with zero_grad() has it."""

    def __init__(self, layer: nn.Module, x: Tensor, toward: Tensor) -> None:
        self.layer, self.x, self.toward = layer, x, toward

    def run(self) -> None:
        self.layer.zero_grad()
        self.x.grad = None
        self.layer(self.x).backward(self.toward)

    def timed_sec(self) -> tuple[float, float]:
        """By the clock, and of the CPU in all threads."""
        started, computed = time.perf_counter(), time.process_time()
        self.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started, time.process_time() - computed

    def peak_bytes(self) -> int:
        """Weights, buffers and two moments of what is trained, and the peak of a forward and backward beyond them."""
        self.layer.zero_grad()
        self.x.grad = None
        held = sum(tensor.nbytes for tensor in (*self.layer.parameters(), *self.layer.buffers()))
        moments = sum(2 * param.nbytes for param in self.layer.parameters() if param.requires_grad)
        return held + moments + peak_extra_bytes(self.run)


def measure(layers: dict[str, nn.Module], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row a layer."""
    rows, columns = layers["linear"].weight.shape  # type: ignore[misc]
    x, toward = torch.randn(tokens, columns, requires_grad=True), torch.randn(tokens, rows)
    turns = {name: Turn(layer, x, toward) for name, layer in layers.items()}
    peaks = {name: turn.peak_bytes() for name, turn in turns.items()}  # and the first call of each
    rounds = [{name: turn.timed_sec() for name, turn in turns.items()} for _ in range(repeats)]
    return [
        {
            "layer": name,
            "shape": [rows, columns],
            "tokens": tokens,
            "rank": RANK if name != "linear" else None,
            "ms": round(1e3 * statistics.median(one[name][0] for one in rounds), 1),
            "ratio": round(statistics.median(one[name][0] / one["linear"][0] for one in rounds), 3),
            "cpu_ratio": round(statistics.median(one[name][1] / one["linear"][1] for one in rounds), 3),
            "peak_mib": round(peaks[name] / 2**20, 1),
            "peak_ratio": round(peaks[name] / peaks["linear"], 3),
        }
        for name in turns
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES], metavar="OxI")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, a third of them above 500 billion operations")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore")
    table = Table(title=f"forward and backward of a layer at rank {RANK}; ratios to nn.Linear, peak with Adam's state")
    for title in ("layer", "shape", "tokens", "ms", "ratio", "CPU ratio", "peak MiB", "ratio"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    rows = earlier_rows("layer_time")
    for shape in arguments.shapes:
        size = [int(side) for side in shape.split("x")]
        layers = layers_of(*size)
        for tokens in arguments.tokens:
            large = 6 * tokens * size[0] * size[1] > 5e11
            found = measure(layers, tokens, max(3, arguments.repeats // 3) if large else arguments.repeats)
            for row in found:
                numbers = [row[key] for key in ("ms", "ratio", "cpu_ratio", "peak_mib", "peak_ratio")]
                table.add_row(row["layer"], shape, *map(str, (tokens, *numbers)))
                print(row, flush=True)
            rows = [row for row in rows if (row["shape"], row["tokens"]) != (size, tokens)] + found
            path = write_rows("layer_time", sorted(rows, key=lambda row: (row["shape"], row["tokens"])))
            rows = earlier_rows("layer_time")
    Console(width=120).print(table)
    print("written to", path)


if __name__ == "__main__":
    main()
