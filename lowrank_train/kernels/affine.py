"""Affine 4- and 8-bit codes of groups of numbers, 4-bit ones two to a byte: the reference, and where a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Size, Tensor

from lowrank_train.kernels.dispatch import is_tile, runs_kernel

SMALLEST_RANGE = 1e-5  # Q-GaLore's code: of a group whose numbers are all nearly the same


@dataclass(frozen=True)
class Affine:
    """Numbers as (code - zero) * scale, with one scale and one zero for each group of the flattened tensor."""

    codes: Tensor  # uint8; (numel,) with 8 bits, (ceil(numel / 2),) with 4: the even positions in the low half
    scale: Tensor  # (groups,) float32
    zero: Tensor  # (groups,) uint8: the code of 0


def empty_affine(shape: Size | tuple[int, ...], *, bits: int, group: int, device: torch.device) -> Affine:
    """Codes of zeros; counts the bytes on the meta device."""
    numel = Size(shape).numel()
    stored, groups = numel if bits == 8 else -(-numel // 2), -(-numel // group)
    codes, zero = (torch.zeros(length, dtype=torch.uint8, device=device) for length in (stored, groups))
    return Affine(codes, torch.zeros(groups, device=device), zero)


def quantize_affine(
    values: Tensor, *, bits: int, group: int = 256, uniform: Tensor | None = None, published: bool = False
) -> Affine:
    """scale = (hi - lo) / (2^bits - 1), zero = -round(lo / scale), code = round(x / scale) + zero.

    lo and hi are the least and the greatest number of a group, and 0, so that 0 is always among the codes. Groups run
    over the flattened tensor and the last may be shorter. The error of a number is at most scale.
    uniform: numbers from [0, 1) of the shape of `values`, for stochastic rounding: up where x / scale - floor is above
        the number, so that the expectation is x. For the ends of a group too there must be a code on both sides of
        them: scale = (hi - lo) / (2^bits - 2), zero = ceil(-lo / scale). Otherwise rounding is to the nearest, to even
        where two are as near.
    published: as the code of Q-GaLore (arXiv 2407.08296), which leaves 0 out, so that a group whose numbers have one
        sign is cut off, and has one scale for both ways of rounding, so that the ends of a group are drawn inwards.
    """
    if is_tile(group) and not published and runs_kernel(values, uniform):
        from lowrank_train.kernels.triton import affine

        return affine.quantize_affine(values, bits=bits, group=group, uniform=uniform)
    return quantize_affine_reference(values, bits=bits, group=group, uniform=uniform, published=published)


def quantize_affine_reference(
    values: Tensor, *, bits: int, group: int = 256, uniform: Tensor | None = None, published: bool = False
) -> Affine:
    """`quantize_affine` in plain torch."""
    flat = values.detach().flatten().float()
    groups, levels = -(-flat.numel() // group), 2**bits - 1
    padded = torch.nn.functional.pad(flat, (0, groups * group - flat.numel())).view(groups, group)
    lowest, highest = _ends(padded, flat.numel() if published else None)
    if uniform is None or published:
        scale = (highest - lowest).clamp_min_(SMALLEST_RANGE).div_(levels)
        zero = (lowest / scale).round_().neg_().clamp_(0, levels)
    else:
        scale = (highest - lowest).clamp_min_(SMALLEST_RANGE).div_(levels - 1)
        zero = (lowest / scale).neg_().ceil_().clamp_(0, levels)
    whole = padded.div(scale[:, None])
    if uniform is None:
        whole.round_()
    else:
        drawn = torch.nn.functional.pad(uniform.flatten(), (0, padded.numel() - flat.numel())).view_as(padded)
        below = whole.floor()
        whole = below + (drawn < whole - below)
    codes = whole.add_(zero[:, None]).clamp_(0, levels).to(torch.uint8).flatten()[: flat.numel()]
    return Affine(codes if bits == 8 else pack(codes), scale, zero.to(torch.uint8))


def dequantize_affine(stored: Affine, shape: Size | tuple[int, ...], *, bits: int, group: int = 256) -> Tensor:
    """The float32 numbers of `shape` that the codes stand for."""
    if is_tile(group) and runs_kernel(stored.codes, stored.scale, stored.zero):
        from lowrank_train.kernels.triton import affine

        return affine.dequantize_affine(stored, shape, bits=bits, group=group)
    return dequantize_affine_reference(stored, shape, bits=bits, group=group)


def dequantize_affine_reference(
    stored: Affine, shape: Size | tuple[int, ...], *, bits: int, group: int = 256
) -> Tensor:
    """`dequantize_affine` in plain torch."""
    numel = Size(shape).numel()
    codes = stored.codes if bits == 8 else unpack(stored.codes)
    groups = len(stored.scale)
    padded = torch.nn.functional.pad(codes[:numel].float(), (0, groups * group - numel)).view(groups, group)
    padded.sub_(stored.zero[:, None]).mul_(stored.scale[:, None])
    return padded.flatten()[:numel].view(shape)


def _ends(padded: Tensor, numel: int | None) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each group and 0; given how many numbers there are, of these without 0."""
    lowest, highest = padded.amin(1), padded.amax(1)
    if numel is None:
        return lowest.clamp_max_(0), highest.clamp_min_(0)
    last = padded.flatten()[(len(padded) - 1) * padded.shape[1] : numel]
    lowest[-1], highest[-1] = last.min(), last.max()
    return lowest, highest


def pack(codes: Tensor) -> Tensor:
    """Flat 4-bit codes two to a byte, the even positions in the low half."""
    even = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return even[0::2] | (even[1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes of both halves of each byte; one more than were packed, where their number was odd."""
    return torch.stack((packed & 15, packed >> 4), 1).flatten()
