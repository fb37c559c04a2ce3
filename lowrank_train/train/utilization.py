"""MFU: the share of an accelerator's peak speed that the model's own arithmetic uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from lowrank_train.memory.counting import flops_per_position
from lowrank_train.memory.devices import device_name, peak_bf16_flops


def utilization(
    model: PreTrainedModel, seq_len: int, device: torch.device, world_size: int
) -> tuple[Callable[[float], float] | None, str]:
    """A function from positions per second over all devices to MFU, or None on a device without a known peak; and the
    line that says how it is computed."""
    name = device_name(device)
    peak = peak_bf16_flops(name) if device.type == "cuda" else None
    if peak is None:
        return None, f"MFU: not given, the peak speed of {name} is not known"
    flops = flops_per_position(model, seq_len)
    line = (
        f"MFU: (6 N + 12 L h T = {flops:.3g} FLOP a position, N without the input embedding) x positions/s / "
        f"({world_size} x {peak / 1e12:.1f} TFLOP/s, dense bf16 peak of {name})"
    )
    return lambda positions_per_sec: positions_per_sec * flops / (peak * world_size), line
