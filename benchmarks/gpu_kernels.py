"""Kernels on a card: their times beside other code's, and beside what their bytes and FLOPs take at the card's limits.

A limit is the longer of two times: the bytes that must cross the memory bus once, by its bandwidth, and the FLOPs of
the matrix products, by the card's dense bf16 speed. `of_limit` is the limit divided by the time measured.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import interleaved_median_sec
from lowrank_train import optimizer
from lowrank_train.kernels.affine import quantize_affine
from lowrank_train.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lowrank_train.kernels.int8_linear import int8_linear
from lowrank_train.memory.devices import peak_bf16_flops
from lowrank_train.nn.sltrain import SLTrainLinear

HIDDEN, INTERMEDIATE, RANK = 4096, 11008, 1024  # LLaMA 7B, and the rank of GaLore's and SLTrain's runs of it
MATRICES = dict.fromkeys("qkvo", (HIDDEN, HIDDEN)) | {
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
TOKENS = 16384
SPARSE_SHARE = 0.05  # of SLTrain's 7B run
NEVER = 1_000_000  # updates between two moves of a basis
REPEATS = 20

BANDWIDTH: tuple[tuple[str, float], ...] = (
    # bytes/s, from NVIDIA's data sheets and architecture white papers of these cards
    (r"NVIDIA B200", 8.0e12),
    (r"NVIDIA H200", 4.8e12),
    (r"NVIDIA H100 80GB HBM3", 3.35e12),
    (r"NVIDIA H100 PCIe", 2.0e12),
    (r"NVIDIA A100-SXM4-80GB", 2.039e12),
    (r"NVIDIA A100 80GB PCIe", 1.935e12),
    (r"NVIDIA A100-(SXM4|PCIE)-40GB", 1.555e12),
    (r"NVIDIA L40S", 0.864e12),
    (r"NVIDIA L4", 0.3e12),
    (r"NVIDIA GeForce RTX 5090", 1.792e12),
    (r"NVIDIA GeForce RTX 4090", 1.008e12),
    (r"NVIDIA GeForce RTX 3090", 0.936e12),
)


@dataclass(frozen=True)
class Cost:
    """What an operation must move and multiply."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def limit_sec(self, name: str) -> float | None:
        """The shortest time on the card of this name; None where its limits are not known."""
        bandwidth = next((value for pattern, value in BANDWIDTH if re.fullmatch(pattern, name)), None)
        peak = peak_bf16_flops(name)
        return None if bandwidth is None or peak is None else max(self.bytes / bandwidth, self.flops / peak)


def projected_step_cost(rows: int, columns: int, rank: int, *, basis_bytes: int, moment_bytes: float) -> Cost:
    """One update of bf16 weights by bf16 gradients with Adam in the subspace.

    Read G and B; read and write both moments; write and read the float32 direction that is made of codes; read B once
    more; read and write W. The two products are 2 M N R each.
    """
    matrix, low = rows * columns, max(rows, columns) * rank
    moved = 2 * matrix + 4 * matrix + 2 * basis_bytes * min(rows, columns) * rank + 4 * moment_bytes * low + 8 * low
    return Cost(moved, 4 * matrix * rank)


def linear_cost(tokens: int, rows: int, columns: int, *, weight_bytes: float, products: int) -> Cost:
    """`products` bf16 products of x (tokens, columns) with W (rows, columns), or of gradients with either."""
    moved = 2 * tokens * (rows + columns) + weight_bytes * rows * columns
    return Cost(products * moved, products * 2 * tokens * rows * columns)


def against_limit(row: dict[str, Any], sec: float, cost: Cost) -> dict[str, Any]:
    limit = cost.limit_sec(torch.cuda.get_device_name())
    share = None if limit is None else round(limit / sec, 3)
    return row | {
        "us": round(1e6 * sec, 1),
        "gb": round(cost.bytes / 1e9, 4),
        "gflop": round(cost.flops / 1e9, 1),
        "of_limit": share,
    }


class Updated:
    """One optimizer on matrices of its own, whose gradients are put back before each step."""

    def __init__(self, build: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer], layers: int) -> None:
        shapes = {f"{layer}.{name}": shape for layer in range(layers) for name, shape in MATRICES.items()}
        made = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for name, shape in shapes.items()}
        self.params = {name: nn.Parameter(value * 0.02) for name, value in made.items()}
        self.grads = [torch.randn_like(param) for param in self.params.values()]
        self.optimizer = build(self.params)

    def prepare(self) -> None:
        for param, grad in zip(self.params.values(), self.grads, strict=True):
            param.grad = grad

    def step(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer.step()


def ours(params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return optimizer("galore_8bit", [*params.items()], lr=1e-4, project=[*params], rank=RANK, update_proj_gap=NEVER)


def theirs(params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW8bit

    group = {"params": [*params.values()], "rank": RANK, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW8bit([group], lr=1e-4)


def projected_steps(layers: int = 2) -> list[dict[str, Any]]:
    """GaLore with 8-bit Adam on the matrices of some LLaMA 7B layers, beside galore-torch with bitsandbytes."""
    sides = {"ours": Updated(ours, layers)}
    try:
        sides["theirs"] = Updated(theirs, layers)
    except ImportError as error:
        print(f"without the published step, which is not installed: {error}")

    def prepare() -> None:
        for side in sides.values():
            side.prepare()

    prepare()
    for _ in range(3):  # the first one makes the bases, the next compile
        for side in sides.values():
            side.step()
        prepare()
    sec = interleaved_median_sec({name: side.step for name, side in sides.items()}, REPEATS, prepare)
    cost = Cost(0, 0)
    for rows, columns in layers * [*MATRICES.values()]:
        cost += projected_step_cost(
            rows, columns, RANK, basis_bytes=basis_bytes(sides["ours"].optimizer), moment_bytes=1 + 4 / 256
        )
    row = against_limit({"layers": layers, "rank": RANK, "step": "galore_8bit"}, sec["ours"], cost)
    if "theirs" in sec:
        row |= {"rival": "galore-torch 1.0, bitsandbytes", "rival_us": round(1e6 * sec["theirs"], 1)}
        row["times_faster"] = round(sec["theirs"] / sec["ours"], 2)
    return [row]


def basis_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of a number of the first basis."""
    states = (state for state in optimizer.state.values())
    return next(
        v.element_size() for state in states for key, v in state.items() if key in ("basis_left", "basis_right")
    )


def layers() -> list[dict[str, Any]]:
    """Forward and backward of SLTrain's layer and of int8 weights beside bf16 nn.Linear, at many tokens."""
    return [row for shape in sorted(set(MATRICES.values())) for row in layer_rows(shape)]


def layer_rows(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Layers made of the same matrix. Codes have no gradient here: two products instead of three, which is allowed for
    in `of_linear`, the throughput as a share of nn.Linear's."""
    linear = nn.Linear(*shape[::-1], bias=False, device="cuda", dtype=torch.bfloat16)
    sltrain = SLTrainLinear.from_linear(linear, rank=RANK, sp_ratio=SPARSE_SHARE).to(torch.bfloat16)
    codes = quantize_affine(linear.weight.detach(), bits=8)
    x = torch.randn(TOKENS, shape[1], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    toward = torch.randn(TOKENS, shape[0], device="cuda", dtype=torch.bfloat16)

    def both_ways(call: Callable[[Tensor], Tensor], *modules: nn.Module) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            for module in modules:
                module.zero_grad()
            call(x).backward(toward)

        return run

    actions = {
        "linear": both_ways(linear, linear),
        "sltrain": both_ways(sltrain, sltrain),
        "int8": both_ways(lambda x: int8_linear(x, codes, shape)),
    }
    sec = interleaved_median_sec(actions, REPEATS)
    rows = []
    for name, products, weight_bytes in (("linear", 3, 2.0), ("sltrain", 3, 2.0), ("int8", 2, 1 + 5 / 256)):
        cost = linear_cost(TOKENS, *shape, weight_bytes=weight_bytes, products=products)
        row = against_limit({"layer": name, "shape": [*shape], "tokens": TOKENS, "rank": RANK}, sec[name], cost)
        rows.append(row | {"of_linear": round(sec["linear"] / sec[name] * products / 3, 3)})
    return rows


def codes(numbers: int = 2**26) -> list[dict[str, Any]]:
    """Encoding and decoding of 8-bit moments and of 4-bit bases."""
    values = torch.randn(numbers, device="cuda")
    coded = quantize_blockwise(values, signed=True)
    actions: dict[str, Callable[[], object]] = {
        "encode 8 bits": lambda: quantize_blockwise(values, signed=True),
        "decode 8 bits": lambda: dequantize_blockwise(*coded, signed=True),
        "encode 4 bits": lambda: quantize_affine(values, bits=4),
    }
    sec = interleaved_median_sec({name: (lambda f=f: (f(), None)[1]) for name, f in actions.items()}, REPEATS)
    sizes = {"encode 8 bits": 5 + 4 / 256, "decode 8 bits": 5 + 4 / 256, "encode 4 bits": 4.5 + 5 / 256}
    return [against_limit({"operation": name}, sec[name], Cost(numbers * sizes[name], 0)) for name in actions]
