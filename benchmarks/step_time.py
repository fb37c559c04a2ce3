"""One optimizer step of every method beside its published implementation, in one process, on LLaMA's matrices.

    .venv/bin/python -m benchmarks.step_time            (benchmarks/rivals.py says what to install)

Rows of methods that are not asked for stay in the results.

The sides get copies of the same gradients and take turns; medians count. `refresh` is a step that moves every basis.
`products` times nothing but the matrix products that the method's algebra cannot do without, on the projected matrices:
PRODUCTS has their operands. What walks a matrix number by number (the norms of a gradient's lines, a sign, the scaled
gradient itself) is not among them, nor is a decomposition, so that 1.0 is out of reach where a method needs these.
`extra` is the peak of a step less what is there before it. Gradients are random: values do not change the time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.rivals import LR, RIVALS, Params
from benchmarks.rows import earlier_rows, interleaved_median_sec, peak_extra_bytes, write_rows
from lowrank_train import optimizer

SIZES = {"llama_60m": (512, 1376, 128), "llama_350m": (1024, 2736, 256)}  # hidden, intermediate, GaLore's rank
VOCABULARY = 32000
NEVER = 1_000_000  # updates between two moves of a basis, where none is wanted


PRODUCTS = {
    "down": "MN NR",  # the gradient, projected
    "up": "MR RN",  # added to a matrix; what can be added up before the product counts once
    "back": "NM MR",  # the gradient with its projection: a step of power iteration, a slope of the basis
    "gram": "RN NR",  # of two bases
    "low_gram": "RM MR",  # of two small matrices
    "turn_basis": "NR RR",
    "turn_low": "MR RR",
    "history": "HL L1",  # 20 earlier small gradients, L = M R numbers each, with one
    "of_history": "1H HL",
}
"""The two factors of a product: M >= N, the sides of a matrix, R its rank, the basis (N, R)."""
HISTORY = 20  # Natural GaLore's


@dataclass(frozen=True)
class Measured:
    """How a method is called, and the products that each update needs."""

    method: str
    every: str | None = None  # the option that says how often the basis moves; None: it does at every update, or never
    options: tuple[tuple[str, Any], ...] = ()
    products: tuple[str, ...] = ("down", "up")


ONLINE = ("down", "back", "gram", "gram", "turn_basis", "turn_basis", "up")
LDADAM = ("up", "down", "low_gram", "turn_basis", "back", "gram", "down", "gram", "turn_low", "turn_low", "up", "up")
METHODS = {
    "adamw": Measured("adamw", products=()),
    "galore": Measured("galore", "update_proj_gap"),
    "galore_adafactor": Measured("galore_adafactor", "update_proj_gap"),
    "fira": Measured("fira", "update_proj_gap"),
    "apollo": Measured("apollo", "update_proj_gap", products=("down",)),
    "apollo_mini": Measured(
        "apollo", "update_proj_gap", (("rank", 1), ("scale_type", "tensor"), ("scale", 128.0)), ("down",)
    ),
    "frugal": Measured("frugal", "update_gap", (("density", 0.25),), ("down", "up", "up")),
    "frugal_coord": Measured("frugal_coord", "update_gap", (("density", 0.25),), ()),
    "online_subspace": Measured("online_subspace", products=ONLINE),
    "ldadam": Measured("ldadam", products=LDADAM),
    "dct_adamw": Measured("dct_adamw", "update_proj_gap"),
    "flora": Measured("flora", products=("down", "gram", "turn_low", "up")),
    "natural_galore": Measured("natural_galore", "update_proj_gap", products=("down", "history", "of_history", "up")),
}


def parameters(hidden: int, intermediate: int, layers: int) -> tuple[Params, Params]:
    """The matrices that are projected, and the rest, with the shapes of a LLaMA of `layers` layers."""
    projected: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name in "qkvo":
            projected[f"layers.{layer}.attn.{name}.weight"] = (hidden, hidden)
        projected |= {f"layers.{layer}.mlp.{name}.weight": (intermediate, hidden) for name in ("gate", "up")}
        projected[f"layers.{layer}.mlp.down.weight"] = (hidden, intermediate)
    rest: dict[str, tuple[int, ...]] = {"embed": (VOCABULARY, hidden), "head": (VOCABULARY, hidden), "norm": (hidden,)}
    made = ({name: nn.Parameter(torch.randn(s) * 0.02) for name, s in part.items()} for part in (projected, rest))
    return tuple(made)  # type: ignore[return-value]


def ours(name: str, projected: Params, rest: Params, rank: int, every: int) -> torch.optim.Optimizer:
    measured = METHODS[name]
    options = dict(measured.options)
    if name not in ("adamw", "frugal", "frugal_coord"):
        options.setdefault("rank", rank)
    if measured.every is not None:
        options[measured.every] = every
    pairs = [*projected.items(), *rest.items()]
    return optimizer(measured.method, pairs, lr=LR, project=list(projected) if name != "adamw" else None, **options)


class Side:
    """One optimizer with parameters of its own, and fresh copies of the gradients before each step."""

    def __init__(self, build: Callable[..., torch.optim.Optimizer], parts: tuple[Params, Params], *how: Any) -> None:
        own = [{name: nn.Parameter(param.detach().clone()) for name, param in part.items()} for part in parts]
        self.params = [param for part in own for param in part.values()]
        self.optimizer = build(*own, *how)

    def prepare(self, gradients: list[Tensor]) -> None:
        for param, gradient in zip(self.params, gradients, strict=False):
            param.grad = gradient.clone()

    def step(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer.step()


def products_alone(projected: Params, rank: int, products: tuple[str, ...]) -> Callable[[], None]:
    """The products of every projected matrix, into memory that is there already."""
    work = []
    for param in projected.values():
        rows, columns = max(param.shape), min(param.shape)
        sizes = {"M": rows, "N": columns, "R": rank, "H": HISTORY, "L": rows * rank, "1": 1}
        for product in products:
            factors = [torch.randn(sizes[first], sizes[second]) for first, second in PRODUCTS[product].split()]
            into = torch.zeros(len(factors[0]), factors[1].shape[1])
            work.append((product == "up", into, factors[0], factors[1]))

    def run() -> None:
        for adds, into, first, second in work:
            if adds:
                into.addmm_(first, second, alpha=-LR)
            else:
                torch.mm(first, second, out=into)

    return run


def measure(name: str, model: str, layers: int, repeats: int, refresh_repeats: int) -> dict[str, Any]:
    """One row: a method on one model."""
    hidden, intermediate, rank = SIZES[model]
    parts = parameters(hidden, intermediate, layers)
    package, rival = RIVALS.get(name, ("", None))
    builders: dict[str, Callable[..., torch.optim.Optimizer]] = {"ours": lambda *how: ours(name, *how)}
    if rival is not None:
        try:
            rival({"matrix": nn.Parameter(torch.zeros(4, 4))}, {}, 1, NEVER)
            builders["theirs"] = rival
        except ImportError as error:
            print(f"{name}: without {package}, which is not installed ({error}); see benchmarks/rivals.py")
            package = ""
    measured = METHODS[name]
    row: dict[str, Any] = {"method": name, "model": model, "layers": layers, "rank": rank, "rival": package or None}
    sec = timed(builders, parts, rank, NEVER, repeats)
    row |= in_ms("step", sec)
    if measured.every is not None:
        row |= in_ms("refresh", timed(builders, parts, rank, 1, refresh_repeats))
    if measured.products:
        alone = products_alone(parts[0], rank if name != "apollo_mini" else 1, measured.products)
        only = timed({"ours": builders["ours"]}, (parts[0], {}), rank, NEVER, repeats, {"products": alone})
        row |= {"products_ms": ms(only["products"]), "over_products": round(only["ours"] / only["products"], 2)}
    for side, build in builders.items():
        one = Side(build, parts, rank, NEVER)
        gradients = [torch.randn_like(param) for param in one.params]
        for _ in range(2):
            one.prepare(gradients)
            one.step()
        one.prepare(gradients)
        row[f"{side}_extra_mib"] = round(peak_extra_bytes(one.step) / 2**20, 1)
    return row


def timed(
    builders: dict[str, Callable[..., torch.optim.Optimizer]],
    parts: tuple[Params, Params],
    rank: int,
    every: int,
    repeats: int,
    others: dict[str, Callable[[], None]] | None = None,
) -> dict[str, float]:
    sides = {name: Side(build, parts, rank, every) for name, build in builders.items()}
    gradients = [torch.randn_like(param) for part in parts for param in part.values()]

    def prepare() -> None:
        for side in sides.values():
            side.prepare(gradients)

    actions = {name: side.step for name, side in sides.items()} | (others or {})
    return interleaved_median_sec(actions, repeats, prepare)


def ms(sec: float) -> float:
    return round(1e3 * sec, 1)


def in_ms(what: str, sec: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {f"{side}_{what}_ms": ms(value) for side, value in sec.items()}
    if "theirs" in sec:
        row[f"{what}_ratio"] = round(sec["ours"] / sec["theirs"], 3)
    return row


COLUMNS = {
    "method": "method",
    "model": "model",
    "rival": "rival",
    "ours_step_ms": "step ms",
    "step_ratio": "to theirs",
    "over_products": "to products",
    "ours_refresh_ms": "refresh ms",
    "refresh_ratio": "to theirs",
    "ours_extra_mib": "extra MiB",
    "theirs_extra_mib": "theirs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layers-60m", type=int, default=8, help="of 8; 0 leaves the model away")
    parser.add_argument("--layers-350m", type=int, default=2, help="of 24; the time is linear in them")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--refresh-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    layers_of = {"llama_60m": arguments.layers_60m, "llama_350m": arguments.layers_350m}
    table = Table(title="one optimizer step; ratios: ours to theirs, and to the unavoidable products alone")
    for title in COLUMNS.values():
        table.add_column(title, justify="left" if title in ("method", "model", "rival") else "right")
    rows = []
    for model, layers in layers_of.items():
        for name in arguments.methods if layers else []:
            rows.append(measure(name, model, layers, arguments.repeats, arguments.refresh_repeats))
            table.add_row(*(str(rows[-1].get(key) or "") for key in COLUMNS))
            print(rows[-1], flush=True)
    Console(width=150).print(table)
    measured = {(row["model"], row["method"]) for row in rows}
    kept = [row for row in earlier_rows("step_time") if (row["model"], row["method"]) not in measured]
    order = list(METHODS)
    rows = sorted(kept + rows, key=lambda row: (list(SIZES).index(row["model"]), order.index(row["method"])))
    print("written to", write_rows("step_time", rows))


if __name__ == "__main__":
    main()
