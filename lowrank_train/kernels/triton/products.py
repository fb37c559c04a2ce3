"""What kernels with matrix products have in common: tiles in registers, and how exact a product of float32 is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


def precision() -> str:
    """Of products of float32: as torch's own, by torch.set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def index_type(*tensors: Tensor) -> tl.dtype:
    """In which places in these are counted: 32 bits where they do, since 64 take twice the registers of a tile."""
    return tl.int32 if all(tensor.numel() < 2**31 for tensor in tensors) else tl.int64


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """total + a b; WIDEN: in the interpreter, which multiplies bfloat16 as whole numbers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
