"""Counted bytes of each strategy against the formulas of the methods' papers and codes, from 60M to 7B, on meta.

m x n is a matrix, d and q its short and its long side, r the rank. All is bfloat16, 2 bytes a number, unless a formula
says otherwise. Where we keep more or less than the source, the formula says so beside the figure.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lowrank_train.config import compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.plan import kept_bytes

VOCABULARY = 32_000
SIZES = {  # hidden, ffn, layers, rank: table 5 of arXiv 2403.03507
    "llama_60m": (512, 1376, 8, 128),
    "llama_130m": (768, 2048, 12, 256),
    "llama_350m": (1024, 2736, 24, 256),
    "llama_1b": (2048, 5461, 24, 512),
    "llama_7b": (4096, 11008, 32, 1024),
}
INDEX, FLOAT32 = 8, 4  # bytes; places are int64


@dataclass(frozen=True)
class Matrix:
    m: int
    n: int
    r: int

    @property
    def d(self) -> int:
        return min(self.m, self.n)

    @property
    def q(self) -> int:
        return max(self.m, self.n)


Formula = Callable[[Matrix], float]


def quantized(numbers: int) -> int:
    """8 bits a number, a float32 scale for each block of 256; fewer than 4,096 stay in float32 (arXiv 2110.02861)."""
    return numbers + FLOAT32 * -(-numbers // 256) if numbers >= 4096 else FLOAT32 * numbers


def galore(w: Matrix) -> float:
    """mn + dr + 2qr numbers."""
    return 2 * (w.m * w.n + w.d * w.r + 2 * w.q * w.r)


def lora(w: Matrix) -> float:
    """mn + 3 r(m+n) numbers."""
    return 2 * (w.m * w.n + 3 * w.r * (w.m + w.n))


def at_density(w: Matrix, share: float) -> Matrix:
    return Matrix(w.m, w.n, int(share * w.d))


def columns(w: Matrix, moments: int) -> float:
    """mn + moments of a share of the columns, and their numbers."""
    chosen = int(0.25 * w.n)
    return 2 * (w.m * w.n + moments * w.m * chosen) + INDEX * chosen


def sltrain(w: Matrix) -> float:
    """3 [r(m+n) + delta mn] numbers and delta mn places: int32, where the published code takes int64."""
    kept = int(0.03 * w.m * w.n)
    return 2 * 3 * (w.r * (w.m + w.n) + kept) + 4 * kept


def sst(w: Matrix) -> float:
    """k(m+n+1) stored, moments of r(m+n) + k; and which vectors are trained, k places."""
    k = w.d
    return 2 * (k * (w.m + w.n + 1) + 2 * (w.r * (w.m + w.n) + k)) + INDEX * k


PROJECTED = "strategy.subspace.rank"
FACTORS = "strategy.weights.rank"
# strategy -> the key of its rank, the bytes of a matrix with its state
FORMULAS: dict[str, tuple[str | None, Formula]] = {
    "full": (None, lambda w: 2 * 3 * w.m * w.n),
    "lion": (None, lambda w: 2 * 2 * w.m * w.n),
    "sgd": (None, lambda w: 2 * 2 * w.m * w.n),
    "galore": (PROJECTED, galore),
    "galore_lion": (PROJECTED, lambda w: galore(w) - 2 * w.q * w.r),
    "golore": (PROJECTED, galore),
    "galore_8bit": (PROJECTED, lambda w: 2 * (w.m * w.n + w.d * w.r) + 2 * quantized(w.q * w.r)),
    "fira": (PROJECTED, lambda w: galore(w) + FLOAT32),  # the last norm, for the limiter
    "apollo": (PROJECTED, lambda w: galore(w) + FLOAT32),  # as the code, which keeps the projection
    "apollo_mini": (None, lambda w: 2 * (w.m * w.n + w.d + 2 * w.q) + FLOAT32),  # rank 1
    "frugal": (None, lambda w: galore(at_density(w, 0.25))),
    "frugal_random": (None, lambda w: galore(at_density(w, 0.25))),
    "frugal_lion": (None, lambda w: galore(at_density(w, 0.25)) - 2 * w.q * int(0.25 * w.d)),
    "frugal_sgd": (None, lambda w: 2 * (w.m * w.n + w.d * int(0.25 * w.d))),
    "frugal_coord": (None, lambda w: columns(w, 2)),
    "natural_galore": (PROJECTED, lambda w: galore(w) + 2 * 20 * w.q * w.r + 8 * 20 * 20),  # h = 20, H^T H in float64
    "online_subspace": (
        PROJECTED,
        lambda w: galore(w) + 2 * 3 * w.d * w.r,
    ),  # B's moments, its gradient
    "ldadam": (PROJECTED, lambda w: galore(w) + 2 * w.m * w.n),  # the error
    "lora": (FACTORS, lora),
    "dora": (FACTORS, lambda w: lora(w) + (FLOAT32 + 2 * 2) * w.m),  # magnitudes in float32
    "relora": (FACTORS, lambda w: lora(w) + 2 * w.m * w.n),  # what merges into bfloat16 would lose
    "lowrank": (FACTORS, lambda w: 2 * 3 * w.r * (w.m + w.n)),
    "sltrain": (FACTORS, sltrain),
    "sst": (FACTORS, sst),
}

MOMENTS_OF_REST = {"lion": 1, "sgd": 1, "galore_lion": 1, "frugal_lion": 1, "frugal_sgd": 0}  # else Adam's two


def matrices(size: str) -> list[Matrix]:
    hidden, ffn, layers, rank = SIZES[size]
    return layers * [*4 * [Matrix(hidden, hidden, rank)], *2 * [Matrix(ffn, hidden, rank)], Matrix(hidden, ffn, rank)]


def others(size: str) -> tuple[list[int], list[int]]:
    """Numbers of the embedding and the head, and of each norm: one before attention, MLP and head."""
    hidden, _, layers, _ = SIZES[size]
    return 2 * [VOCABULARY * hidden], (2 * layers + 1) * [hidden]


@functools.cache
def configured(*words: str) -> RunConfig:
    return compose([*words, "precision=bf16", "recipe=null", "task=plan"])


def counted(strategy: str, size: str, rank_key: str | None = None) -> int:
    """Persistent bytes without buffers, which are rotary frequencies."""
    chosen = copy.deepcopy(configured(f"strategy={strategy}").strategy)
    if rank_key is not None:
        _, axis, key = rank_key.split(".")
        getattr(chosen, axis)[key] = SIZES[size][3]
    kept = kept_bytes(dataclasses.replace(configured(f"model={size}"), strategy=chosen), VOCABULARY)
    return sum(count for kind, count in kept.items() if kind != "buffers")


@pytest.mark.parametrize("strategy", FORMULAS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_matrices_and_their_state(strategy: str, size: str) -> None:
    """Embedding, head and norms: the weight and the moments of the rule for the rest."""
    rank_key, formula = FORMULAS[strategy]
    rest = sum(sum(numbers) for numbers in others(size))
    moments = MOMENTS_OF_REST.get(strategy, 2)
    expected = sum(map(formula, matrices(size))) + 2 * (1 + moments) * rest
    if strategy == "galore_8bit":
        expected = sum(map(formula, matrices(size)))
        expected += sum(2 * count + 2 * quantized(count) for numbers in others(size) for count in numbers)
    assert counted(strategy, size, rank_key) == expected


@pytest.mark.parametrize("size", SIZES)
def test_dct_shares_one_table_a_width(size: str) -> None:
    """mn + 2qr, r places a matrix, and d x d cosines in float32 once for each d: one here, the hidden size."""
    hidden, _, _, _ = SIZES[size]
    rest = sum(sum(numbers) for numbers in others(size))
    own = sum(2 * (w.m * w.n + 2 * w.q * w.r) + INDEX * w.r for w in matrices(size))
    assert counted("dct_adamw", size, PROJECTED) == own + FLOAT32 * hidden**2 + 2 * 3 * rest


@pytest.mark.parametrize("size", SIZES)
def test_flora_keeps_its_projection_nowhere(size: str) -> None:
    """mn + qr + (m + n) at rank 16; the rest by Adafactor with momentum, norms without factors."""
    tables, norms = others(size)
    hidden = SIZES[size][0]
    own = sum(2 * (w.m * w.n + 16 * w.q + w.m + w.n) for w in matrices(size))
    rest = sum(2 * (2 * numbers + VOCABULARY + hidden) for numbers in tables) + 2 * 3 * sum(norms)
    assert counted("flora", size) == own + rest


@pytest.mark.parametrize("size", SIZES)
def test_badam_keeps_moments_of_one_layer(size: str) -> None:
    """All weights and the two moments of the layer that is trained; embedding, head and last norm are frozen."""
    hidden, _, layers, _ = SIZES[size]
    own = matrices(size)
    weights = sum(w.m * w.n for w in own) + sum(sum(numbers) for numbers in others(size))
    layer = sum(w.m * w.n for w in own[: len(own) // layers]) + 2 * hidden
    assert counted("badam", size) == 2 * (weights + 2 * layer)


@pytest.mark.parametrize(
    ("strategy", "rank_key", "gigabytes"),
    [
        ("full", None, ("0.348", "0.805", "2.208", "8.034", "40.43")),
        ("galore", PROJECTED, ("0.280", "0.611", "1.389", "4.763", "22.88")),
        ("fira", PROJECTED, ("0.280", "0.611", "1.389", "4.763", "22.88")),
    ],
)
def test_totals_of_weights_and_state(strategy: str, rank_key: str | None, gigabytes: tuple[str, ...]) -> None:
    """GB worked out from the papers' shapes by another hand, to the digits given."""
    found = [counted(strategy, size, rank_key) / 1e9 for size in SIZES]
    assert [f"{gb:.{len(text.partition('.')[2])}f}" for gb, text in zip(found, gigabytes, strict=True)] == [*gigabytes]
