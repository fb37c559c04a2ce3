"""Number formats of stored state: what a tensor becomes in a state, and how it comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Size, Tensor

from lowrank_train.kernels.blockwise import Spacing, dequantize_blockwise, quantize_blockwise
from lowrank_train.optim.transform import State, counter, tensor_of

Format = Literal["fp32", "bf16", "q8", "q8_linear", "q4"]
SCALE = ".scale"


@dataclass(frozen=True)
class Codes:
    """How many bits a code has, and how the values are spread that signed and never negative numbers get."""

    bits: int
    signed: Spacing
    unsigned: Spacing


CODES_OF: dict[str, Codes] = {
    "q8": Codes(8, "dynamic", "dynamic"),  # 8-bit Adam, arXiv 2110.02861
    "q8_linear": Codes(8, "linear", "linear"),
    "q4": Codes(4, "dynamic", "linear"),  # 4-bit AdamW, arXiv 2309.01507, without its normalisation by rows and columns
}
NARROW = ("bf16", *CODES_OF)


def piece_of(key: str) -> Literal["first", "second", "other"]:
    """Of what a state tensor of this name is an average: the gradient, its squares, or neither."""
    if is_square(key):
        return "second"
    return "first" if "exp_avg" in key or "momentum" in key else "other"


def is_square(key: str) -> bool:
    """Whether a state of this name is never negative: exp_avg_sq, square_avg, exp_avg_var, Adamax's exp_inf."""
    return any(word in key for word in ("_sq", "square", "_avg_var", "exp_inf"))


def stored_in(state: State) -> dict[str, str]:
    """Name -> format of every tensor of a rule that is stored narrower; what belongs to a basis is not the rule's."""
    return {
        name: dot_format[1:]
        for key in state
        for name, dot_format in [_split(key)]
        if dot_format[1:] in NARROW and not name.startswith("basis")
    }


def _split(key: str) -> tuple[str, str]:
    name, dot, last = key.rpartition(".")
    return name, dot + last


def keys_of(name: str, fmt: str, state: State) -> list[str]:
    """The entries that a stored tensor consists of: itself, its scales, and its sizes where the codes do not tell."""
    return [key for key in state if key in (f"{name}.{fmt}", name + SCALE) or key.startswith(f"{name}.size")]


def empty(name: str, fmt: Format, like: Tensor, block: int) -> State:
    """A tensor of zeros in this format; only counted on the meta device."""
    if fmt == "bf16":
        return {f"{name}.bf16": torch.zeros_like(like, dtype=torch.bfloat16)}
    blocks, packed = -(-like.numel() // block), CODES_OF[fmt].bits == 4
    shape = (-(-like.numel() // 2),) if packed else like.shape
    codes = torch.zeros(shape, dtype=torch.uint8, device=like.device)
    scale = torch.zeros(blocks, dtype=torch.float32, device=like.device)  # makes every code 0
    sizes: State = {f"{name}.size{axis}": size for axis, size in enumerate(like.shape)} if packed else {}
    return {f"{name}.{fmt}": codes, name + SCALE: scale} | sizes


def encode_(name: str, fmt: str, value: Tensor, state: State, block: int, *, keep_nonzero: bool, table: bool) -> None:
    """The value becomes what the entries of `state` stand for."""
    if fmt == "bf16":
        tensor_of(state, f"{name}.bf16").copy_(value)
        return
    signed, codes = not is_square(name), CODES_OF[fmt]
    made = quantize_blockwise(
        value,
        signed=signed,
        block=block,
        keep_nonzero=keep_nonzero and not signed,
        table=table and fmt == "q8",
        bits=codes.bits,
        spacing=codes.signed if signed else codes.unsigned,
    )
    for key, tensor in zip((f"{name}.{fmt}", name + SCALE), made, strict=True):
        tensor_of(state, key).copy_(tensor)


def decode(name: str, fmt: str, state: State, block: int) -> Tensor:
    """In float32, of the shape it was stored with."""
    stored = tensor_of(state, f"{name}.{fmt}")
    if fmt == "bf16":
        return stored.float()
    signed, codes = not is_square(name), CODES_OF[fmt]
    return dequantize_blockwise(
        stored,
        tensor_of(state, name + SCALE),
        signed=signed,
        block=block,
        bits=codes.bits,
        spacing=codes.signed if signed else codes.unsigned,
        shape=shape_of(name, fmt, state),
    )


def shape_of(name: str, fmt: str, state: State) -> Size:
    """Of the tensor that is stored."""
    if fmt in CODES_OF and CODES_OF[fmt].bits == 4:
        axes = sum(key.startswith(f"{name}.size") for key in state)
        return Size(counter(state, f"{name}.size{axis}") for axis in range(axes))
    return tensor_of(state, f"{name}.{fmt}").shape


def part(name: str, fmt: str, state: State, start: int, length: int, block: int) -> State:
    """Views of `length` numbers from `start` on, a multiple of the block, as the state of a flat tensor."""
    stored = tensor_of(state, f"{name}.{fmt}").view(-1)
    if fmt == "bf16":
        return {f"{name}.bf16": stored[start : start + length]}
    scale = tensor_of(state, name + SCALE)[start // block : -(-(start + length) // block)]
    if CODES_OF[fmt].bits == 4:
        stored = stored[start // 2 : -(-(start + length) // 2)]
        return {f"{name}.{fmt}": stored, name + SCALE: scale, f"{name}.size0": length}
    return {f"{name}.{fmt}": stored[start : start + length], name + SCALE: scale}
