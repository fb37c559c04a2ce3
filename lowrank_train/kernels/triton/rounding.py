"""Rounding in registers: to bfloat16 to the nearest or at random, to whole numbers, and the random bits for it."""

from __future__ import annotations

import triton
import triton.language as tl

WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: from there to 2^24 float32 holds exactly the whole numbers


@triton.jit
def nearest_bfloat16(x: tl.tensor) -> tl.tensor:
    """To even where two are as near, NaN kept; spelt out, since Triton's interpreter cuts off instead of rounding."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return rounded.to(tl.bfloat16)


@triton.jit
def rounded(x: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """float32 -> kind, to the nearest."""
    if kind == tl.bfloat16:
        result = nearest_bfloat16(x)
    else:
        result = x.to(kind)
    return result


@triton.jit
def random_bfloat16(x: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """Up with a probability equal to the distance from the lower neighbour; noise is uint32 below 2^16."""
    bits = (x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    rounded = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return rounded.to(tl.bfloat16)


@triton.jit
def nearest_whole(x: tl.tensor) -> tl.tensor:
    """To even where two are as near; for magnitudes up to 2^22."""
    return (x + WHOLE) - WHOLE


@triton.jit
def noise_of(seed: tl.tensor, octets: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """As kernels/philox.py: eight uint32 below 2^16 for each entry of `octets`, in three more axes of length 2."""
    low = octets.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, rows.to(tl.uint32) + zero, zero, zero)
    evens = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    odds = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    return tl.join(evens, odds)
