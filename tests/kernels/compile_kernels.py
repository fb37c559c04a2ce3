"""Compiles every launch of every kernel for cards that the machine does not have; prints a line of JSON for each.

Run as a program, without TRITON_INTERPRET. The functions that launch kernels are called as in use, on CPU tensors, with
a driver that names a card; a launch then ends after the compilation, specialised as on that card.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from lowrank_train.kernels import triton as ours
from lowrank_train.kernels.affine import empty_affine
from lowrank_train.kernels.lifted_update import AdamDirection, Residual
from lowrank_train.kernels.triton import (
    adam_8bit,
    affine,
    blockwise,
    int8_linear,
    int8_update,
    lifted_update,
    projected_adam,
    sparse_lowrank,
    unit_columns,
)

CPU = torch.device("cpu")
CARDS = {80: (torch.float32, 101_376), 89: (torch.bfloat16, 101_376), 90: (torch.bfloat16, 232_448)}
"""Compute capability -> what is launched, and the bytes of shared memory that a block may have there.

From the CUDA C++ Programming Guide, compute capabilities. What is compiled for 8.0 also runs on 8.9, which has least.
Sums in float32 take no tensor cores (but where TF32 is allowed), so that one card stands for all of them; bfloat16 is
compiled for both kinds of tensor cores, those of 8.x and those of 9.0.
"""


class NamedCard(DriverBase):  # type: ignore[misc]
    """A driver that says which card to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


ROWS, COLUMNS, RANK = 256, 512, 128


def codes() -> tuple[Tensor, Tensor]:
    """The 8-bit codes of a matrix."""
    return torch.zeros(ROWS, COLUMNS, dtype=torch.uint8), torch.zeros(ROWS * COLUMNS // 256)


def launch_codes(dtype: torch.dtype) -> None:
    matrix, narrow = torch.zeros(ROWS, COLUMNS, dtype=dtype), dtype is torch.bfloat16
    blockwise.quantize_blockwise(matrix, signed=not narrow, keep_nonzero=narrow)
    blockwise.dequantize_blockwise(*codes(), signed=True)
    half = blockwise.quantize_blockwise(matrix, signed=narrow, bits=4, spacing="linear", block=128)
    blockwise.dequantize_blockwise(*half, signed=narrow, bits=4, spacing="linear", block=128, shape=matrix.shape)
    affine.quantize_affine(matrix, bits=8, uniform=torch.zeros(ROWS, COLUMNS))
    bits = 4 if narrow else 8
    affine.quantize_affine(matrix, bits=bits)
    affine.dequantize_affine(empty_affine(matrix.shape, bits=bits, group=256, device=CPU), matrix.shape, bits=bits)
    for seed in (None, 2**62) if narrow else (None,):
        adam_8bit.adam_8bit_step(
            matrix,
            matrix,
            codes(),
            codes(),
            step_size=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            decay=0.1,
            decay_first=True,
            block=256,
            keep_nonzero=True,
            seed=seed,
        )


def launch_products(dtype: torch.dtype) -> None:
    forms = [(256, COLUMNS, False)]  # tokens, columns of weights, and whether it is the gradient of the input
    if dtype is torch.bfloat16:
        forms += [(256, COLUMNS, True), (16, COLUMNS, False), (256, 130, False)]  # the last one's groups span rows
    for tokens, columns, input_gradient in forms:
        weight = empty_affine((ROWS, columns), bits=8, group=256, device=CPU)
        x = torch.zeros(tokens, ROWS if input_gradient else columns, dtype=dtype)
        int8_linear.int8_product(x, weight, (ROWS, columns), group=256, input_gradient=input_gradient)
    weight, update = (
        empty_affine((ROWS, COLUMNS), bits=8, group=256, device=CPU),
        torch.zeros(ROWS, COLUMNS, dtype=dtype),
    )
    options: dict[str, Any] = {"decay": 0.1, "decay_first": True, "seed": 2**62 if dtype is torch.bfloat16 else None}
    int8_update.int8_update_(weight, update, factor=-0.1, group=256, **options)


def launch_lifts(dtype: torch.dtype) -> None:
    matrix, low = torch.zeros(ROWS, COLUMNS, dtype=dtype), torch.zeros(ROWS, RANK)
    right, left = torch.zeros(COLUMNS, RANK), torch.zeros(ROWS, RANK)
    options: dict[str, Any] = {"factor": -0.1, "decay": 0.1, "decay_first": True, "group": 256}
    moments, sign = AdamDirection(low, low, 1e-8), Residual(matrix, -1.0, low=low)
    lifted_update.lifted_update_(matrix, moments, right, side="right", residual=sign, seed=None, **options)
    if dtype is torch.bfloat16:
        small, line = torch.zeros(RANK, COLUMNS, dtype=dtype), Residual(matrix, -1.0, line=torch.zeros(1, COLUMNS))
        lifted_update.lifted_update_(matrix, small, left, side="left", residual=line, seed=2**62, **options)
        lifted_update.lifted_update_(matrix, moments, right, side="right", residual=None, seed=None, **options)
        weight = empty_affine((ROWS, COLUMNS), bits=8, group=256, device=CPU)
        lifted_update.lifted_update_(weight, small, left.to(dtype), side="left", residual=None, seed=2**62, **options)


def projection() -> dict[str, Any]:
    return {"betas": (0.9, 0.999), "eps": 1e-8, "grad_factor": 1.0, "keep_nonzero": True}


def launch_projections(dtype: torch.dtype) -> None:
    grad, options = torch.zeros(ROWS, COLUMNS, dtype=dtype), projection()
    right, left, low = torch.zeros(COLUMNS, RANK), torch.zeros(ROWS, RANK), torch.zeros(ROWS, RANK)
    for coded in (True, False) if dtype is torch.bfloat16 else (False,):
        moment = (low.byte(), torch.zeros(ROWS * RANK // 256)) if coded else low
        projected_adam.projected_adam(grad, right, moment, moment, side="right", block=256, keep_low=coded, **options)
    if dtype is torch.bfloat16:
        moment = torch.zeros(RANK, COLUMNS, dtype=torch.uint8), torch.zeros(RANK * COLUMNS // 256)
        projected_adam.projected_adam(grad, left, moment, moment, side="left", block=256, keep_low=False, **options)


def launch_sparse_layers(dtype: torch.dtype) -> None:
    second, first = torch.zeros(ROWS, RANK, dtype=dtype), torch.zeros(RANK, COLUMNS, dtype=dtype)
    weight = first, second, torch.zeros(9, dtype=dtype), torch.arange(9, dtype=torch.int32)
    grad, x = torch.zeros(64, ROWS, dtype=dtype), torch.zeros(64, COLUMNS, dtype=dtype)
    sparse_lowrank.dense_matrix(*weight)
    sparse_lowrank.sparse_lowrank_product(x, *weight, second[:, 0].contiguous(), input_gradient=False)
    sparse_lowrank.sparse_lowrank_product(grad, *weight, None, input_gradient=True)
    sparse_lowrank.sampled_product(grad, x, weight[3])
    unit_columns.unit_columns_(second)


def launch_other_tiles() -> None:
    """Every tile that a kernel may choose but the first, with which it is launched anyway."""

    def others(kernel: str, bucket: str, candidates: Any, device: Any, changed: Any, run: Any) -> Any:
        for tiles in candidates[1:]:
            run(tiles, changed)
        return candidates[0]

    matrix, right, low = torch.zeros(ROWS, COLUMNS).bfloat16(), torch.zeros(COLUMNS, RANK), torch.zeros(ROWS, RANK)
    moment = low.byte(), torch.zeros(ROWS * RANK // 256)
    chosen, lifted_update.chosen, projected_adam.chosen = lifted_update.chosen, others, others
    lift: dict[str, Any] = {"side": "right", "factor": 1.0, "decay": 0.1, "decay_first": True, "group": 256}
    lifted_update.lifted_update_(matrix, low, right, residual=None, seed=None, **lift)
    project: dict[str, Any] = {"side": "right", "block": 256, "keep_low": False, **projection()}
    projected_adam.projected_adam(matrix, right, moment, moment, **project)
    lifted_update.chosen = projected_adam.chosen = chosen


def kernels() -> dict[str, JITFunction]:
    """Every function of the package that is launched."""
    modules = [importlib.import_module(f"{ours.__name__}.{part.name}") for part in pkgutil.iter_modules(ours.__path__)]
    found = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    return {kernel.__name__: kernel for kernel in found}


def main() -> None:
    compiled: list[tuple[str, Any]] = []
    run: Callable[..., Any] = JITFunction.run

    def without_launch(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, **kwargs | {"warmup": True})
        compiled.append((self.__name__, kernel))

    JITFunction.run = partialmethod(without_launch)
    for capability, (dtype, limit) in CARDS.items():
        triton.runtime.driver.set_active(NamedCard(capability))
        compiled.clear()
        launch_codes(dtype)
        launch_products(dtype)
        launch_projections(dtype)
        launch_lifts(dtype)
        launch_sparse_layers(dtype)
        assert {name for name, _ in compiled} == set(kernels()), "each kernel is launched here"
        first = len(compiled)
        if capability == max(CARDS):  # the pipelines of the newest card's tensor cores take most of a tile's stages
            launch_other_tiles()
        for number, (name, kernel) in enumerate(compiled):
            assert {"ptx", "cubin"} <= set(kernel.asm)
            row = {"kernel": name, "capability": capability, "shared": kernel.metadata.shared, "limit": limit}
            print(json.dumps(row | {"first": number < first}), flush=True)


if __name__ == "__main__":
    main()
