"""State in few bits beside bitsandbytes': time to encode and decode, time of a step, what both lose, and bytes.

    OMP_WAIT_POLICY=passive .venv/bin/python -m benchmarks.storage

`codes`: a matrix of moments is encoded and decoded again; the error is that of the matrix in the Frobenius norm.
`step`: Adam on one float32 matrix, state in a format; the error is how far the weights are from those of float32
state after `--updates`, as a share of the way these have gone. All take turns in one process; times are the
medians of the CPU's seconds, which other work on the machine disturbs less, and ratios are to bitsandbytes'.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rows import write_rows
from lowrank_train.optim import state_formats
from lowrank_train.optim.groups import Group
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.state_formats import CODES_OF
from lowrank_train.optim.stored import Storage, Stored
from lowrank_train.optim.transform import Slot, State, Transform

LR = 1e-3
RIVAL = "bitsandbytes 8-bit"


def gradient(side: int, number: int) -> Tensor:
    """Normal numbers in rows and columns of very different size, as gradients have them."""
    generator = torch.Generator().manual_seed(number)
    rows, columns = (10 ** (2 * torch.rand(side, generator=torch.Generator().manual_seed(seed)) - 2) for seed in (1, 2))
    return torch.randn(side, side, generator=generator) * rows[:, None] * columns


def median_cpu_sec(
    actions: dict[str, Callable[[], Any]], repeats: int, prepare: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Of each action, all taking turns; `prepare` comes before each turn of all and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        prepare()
        for name, action in actions.items():
            started = time.process_time()
            action()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first call allocates


class Codes:
    """One format that keeps a tensor, and gives it back."""

    def __init__(self, encode: Callable[[], Any], decode: Callable[[Any], Tensor], held: Callable[[Any], int]) -> None:
        self.encode, self.decode, self.held = encode, decode, held
        self.made = encode()


def our_codes(values: Tensor, fmt: Any) -> Codes:
    storage = Storage()
    block = storage.block_of(fmt)
    state: State = state_formats.empty("exp_avg", fmt, values, block)

    def encode() -> State:
        state_formats.encode_("exp_avg", fmt, values, state, block, keep_nonzero=True, table=False)
        return state

    return Codes(
        encode,
        lambda made: state_formats.decode("exp_avg", fmt, made, block),
        lambda made: sum(value.nbytes for value in made.values() if isinstance(value, Tensor)),
    )


def their_codes(values: Tensor) -> Codes:
    from bitsandbytes import functional

    return Codes(
        lambda: functional.quantize_blockwise(values, blocksize=256),
        lambda made: functional.dequantize_blockwise(*made),
        lambda made: made[0].nbytes + made[1].absmax.nbytes,
    )


def codes(side: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of encoding and decoding."""
    values = gradient(side, 0)
    kinds = {RIVAL: their_codes(values)} | {fmt: our_codes(values, fmt) for fmt in CODES_OF}
    encoding = median_cpu_sec({name: kind.encode for name, kind in kinds.items()}, repeats)
    actions: dict[str, Callable[[], Any]] = {name: partial(kind.decode, kind.made) for name, kind in kinds.items()}
    decoding = median_cpu_sec(actions, repeats)
    return [
        {
            "kind": "codes",
            "format": name,
            "side": side,
            "encode_ms": round(1e3 * encoding[name], 2),
            "decode_ms": round(1e3 * decoding[name], 2),
            "encode_ratio": round(encoding[name] / encoding[RIVAL], 3),
            "decode_ratio": round(decoding[name] / decoding[RIVAL], 3),
            "error": float(f"{(kind.decode(kind.made) - values).norm() / values.norm():.2e}"),
            "bytes_per_number": round(kind.held(kind.made) / values.numel(), 4),
        }
        for name, kind in kinds.items()
    ]


def our_optimizer(param: nn.Parameter, fmt: Any) -> torch.optim.Optimizer:
    rule: Transform = Adam() if fmt == "fp32" else Stored(Adam(), Storage(fmt, fmt, fmt))
    slots = [Slot("w", 0, 0.0, torch.float32)]
    return TransformOptimizer([Group("rest", rule, [("w", param)], slots)], lr=LR)


def their_optimizer(param: nn.Parameter) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit([param], lr=LR, weight_decay=0.0)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of large tensors, so that a code book or a step count does not count."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 256)


def steps(side: int, repeats: int, updates: int) -> list[dict[str, Any]]:
    """Rows of whole steps."""
    makers: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {RIVAL: their_optimizer}
    makers |= {fmt: partial(our_optimizer, fmt=fmt) for fmt in ("fp32", "bf16", *CODES_OF)}
    start = 0.02 * gradient(side, 99).sign()
    params = {name: nn.Parameter(start.clone()) for name in makers}
    optimizers = {name: make(params[name]) for name, make in makers.items()}
    for update in range(updates):
        for name, param in params.items():
            param.grad = gradient(side, update)
            optimizers[name].step()
    exact = params["fp32"].detach().clone()
    errors = {name: float((param.detach() - exact).norm() / (exact - start).norm()) for name, param in params.items()}

    def step(name: str) -> None:
        optimizers[name].step()

    def renew() -> None:
        for param in params.values():
            param.grad = gradient(side, 0)

    sec = median_cpu_sec({name: partial(step, name) for name in makers}, repeats, renew)
    return [
        {
            "kind": "step",
            "format": name,
            "side": side,
            "updates": updates,
            "step_ms": round(1e3 * sec[name], 2),
            "step_ratio": round(sec[name] / sec[RIVAL], 3),
            "error": float(f"{errors[name]:.2e}"),
            "bytes_per_number": round(state_bytes(optimizers[name]) / start.numel(), 4),
        }
        for name in makers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = codes(arguments.side, arguments.repeats) + steps(arguments.side, arguments.repeats, arguments.updates)
    table = Table(title=f"{arguments.side} x {arguments.side}, ratios to bitsandbytes' 8 bits")
    for column in ("format", "encode", "decode", "step", "error", "bytes a number"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        ratios = (f"{row[key]:.2f}" if key in row else "" for key in ("encode_ratio", "decode_ratio", "step_ratio"))
        table.add_row(f"{row['kind']}: {row['format']}", *ratios, f"{row['error']:.1e}", f"{row['bytes_per_number']}")
    path = write_rows("storage", rows)
    Console(width=100).print(table)
    print("written to", path)


if __name__ == "__main__":
    main()
