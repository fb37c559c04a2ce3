"""Which implementation of an operation runs: the Triton kernel where the device has one, else plain torch."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

SMALLEST_CAPABILITY = (8, 0)  # the first with bfloat16 in its matrix units


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether kernels run on the device: an NVIDIA card from Ampere on, with triton installed. Settled at first use."""
    if device.type != "cuda" or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= SMALLEST_CAPABILITY


def runs_kernel(*tensors: Tensor | None) -> bool:
    """Whether an operation on these goes to its kernel; None stands for an operand that is not there.

    Not in a graph of torch.compile, which fuses the reference itself, not for tensors without numbers of their own
    (fake and distributed ones), and not in float64, which kernels do not compute in.
    """
    if torch.compiler.is_compiling():
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype is not torch.float64 and has_kernels(tensor.device)
        for tensor in tensors
        if tensor is not None
    )


def is_tile(block: int) -> bool:
    """Whether kernels work with blocks of this many numbers: powers of two that fit the registers of a program."""
    return 16 <= block <= 4096 and block.bit_count() == 1
