"""State in 8 bits: a rule whose large state tensors are kept as codes and decoded around every use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step
from lowrank_train.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.pieces import PIECE_ELEMENTS
from lowrank_train.optim.direction import Direction
from lowrank_train.optim.moments import Adam, Lion, Momentum, RmsProp
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform, counter, tensor_of

CODES, SCALE = ".q8", ".scale"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
ELEMENTWISE = (Adam, Lion, Momentum, RmsProp)
"""Rules that treat each number by itself, and so can be run on a part of a tensor; not what is derived from them."""


@dataclass
class Storage:
    """How state is stored: 8-bit codes of a dynamic code book with one float32 scale a block (arXiv 2110.02861).

    Costs 1 + 4 / block bytes a number. Tensors of fewer than `min_elements` numbers stay in float32, since they cost
    next to nothing and are often the ones that need digits, such as norms. A block's second moments are stored with
    the unsigned code book, all else with the signed one.
    """

    min_elements: int = 4096  # bitsandbytes' min_8bit_size
    block: int = 256
    keep_nonzero: bool = True  # a second moment too small for the code book becomes its least number instead of 0
    rest: bool = True  # also the state of all parameters that are not selected, the embedding's included
    table: bool = False  # round as bitsandbytes does on the CPU, to replay what it recorded

    def __post_init__(self) -> None:
        for name in ("min_elements", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.storage.{name} is {getattr(self, name)}; it must be at least 1")

    def applies_to(self, value: Tensor | int) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= self.min_elements

    def encode(self, key: str, value: Tensor) -> State:
        signed = not is_square(key)
        keep = self.keep_nonzero and not signed
        codes, scale = quantize_blockwise(value, signed=signed, block=self.block, keep_nonzero=keep, table=self.table)
        return {key + CODES: codes, key + SCALE: scale}

    def decode(self, key: str, state: State) -> Tensor:
        codes, scale = tensor_of(state, key + CODES), tensor_of(state, key + SCALE)
        return dequantize_blockwise(codes, scale, signed=not is_square(key), block=self.block)


@dataclass
class Stored(Transform):
    """`inner` with its state stored by `storage`: decode, update, encode. The direction is made of what is not encoded.

    A state tensor `exp_avg` becomes `exp_avg.q8` (uint8, of its shape) and `exp_avg.scale` (one a block). While an
    update runs, the state of this one parameter exists in float32 beside the codes; that of a rule that goes number by
    number, and serves the whole parameter, only piece by piece.
    """

    inner: Transform
    storage: Storage = field(default_factory=Storage)

    def __post_init__(self) -> None:
        assert not self.inner.compresses, "a subspace stores its basis itself; store the state of the rule inside it"
        self.needs_gradient = self.inner.needs_gradient
        self.maskable = self.inner.maskable
        self.weight_decay_first = self.inner.weight_decay_first

    def init(self, param: Tensor, slot: Slot) -> State:
        wide = replace(slot, dtype=torch.promote_types(slot.dtype, torch.float32))
        state: State = {}
        for key, value in self.inner.init(param, wide).items():
            if self.storage.applies_to(value):
                assert isinstance(value, Tensor)
                blocks = -(-value.numel() // self.storage.block)
                state[key + CODES] = torch.zeros(value.shape, dtype=torch.uint8, device=value.device)
                state[key + SCALE] = torch.zeros(blocks, dtype=torch.float32, device=value.device)  # makes every code 0
            else:
                state[key] = value
        return state

    def misfit(self, shape: torch.Size) -> str | None:
        return self.inner.misfit(shape)

    def update(
        self, compressed: Tensor, state: State, param: Tensor, rates: Rates, grad: Tensor | None = None
    ) -> Direction:
        with self._decoded(state) as opened:
            return self.inner.update(compressed, opened, param, rates, grad)

    def apply(
        self,
        compressed: Tensor,
        state: State,
        param: Tensor,
        rates: Rates,
        decay: Tensor | float = 0.0,
        grad: Tensor | None = None,
    ) -> None:
        tensors = (param, compressed, *(value for value in state.values() if isinstance(value, Tensor)))
        if type(self.inner) not in ELEMENTWISE or not all(tensor.is_contiguous() for tensor in tensors):
            super().apply(compressed, state, param, rates, decay, grad)
            return
        if not isinstance(decay, Tensor) and self._has_kernel(compressed, state, param):
            self._apply_by_kernel(compressed, state, param, rates, decay)
            return
        before = {key: value for key, value in state.items() if isinstance(value, int)}
        size = max(1, PIECE_ELEMENTS["cuda" if param.is_cuda else "cpu"] // self.storage.block) * self.storage.block
        for start in range(0, param.numel(), size):
            part = self._part(state, start, size) | before  # each piece counts its step from the same number
            with self._decoded(part) as opened:
                flat_grad, flat_param = (tensor.view(-1)[start : start + size] for tensor in (compressed, param))
                self.inner.apply(flat_grad, opened, flat_param, rates, decay)
            state.update({key: part[key] for key in before})

    def _has_kernel(self, compressed: Tensor, state: State, param: Tensor) -> bool:
        """Whether one kernel does the whole step: that of Adam, of whose moments both are in codes."""
        coded = (
            type(self.inner) is Adam and not self.storage.table and {f"{key}{CODES}" for key in MOMENTS} <= set(state)
        )
        return coded and is_tile(self.storage.block) and runs_kernel(param, compressed)

    def _apply_by_kernel(self, compressed: Tensor, state: State, param: Tensor, rates: Rates, decay: float) -> None:
        assert isinstance(self.inner, Adam)
        step = state["step"] = counter(state, "step") + 1
        factor, eps = self.inner.factor_and_eps(step)
        first, second = ((tensor_of(state, key + CODES), tensor_of(state, key + SCALE)) for key in MOMENTS)
        adam_8bit_step(
            param,
            compressed,
            first,
            second,
            step_size=rates.lr * factor,
            betas=self.inner.betas,
            eps=eps,
            decay=decay,
            decay_first=self.weight_decay_first,
            block=self.storage.block,
            keep_nonzero=self.storage.keep_nonzero,
        )

    def _part(self, state: State, start: int, size: int) -> State:
        """Views of `size` numbers from `start` on of every state tensor, which the rule has one of for each number."""
        scale_start, scale_size = start // self.storage.block, size // self.storage.block
        part: State = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                is_scale = key.endswith(SCALE) and key.removesuffix(SCALE) + CODES in state
                first, length = (scale_start, scale_size) if is_scale else (start, size)
                part[key] = value.view(-1)[first : first + length]
        return part

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return self.inner.decay_scale(param)

    def rotate(self, state: State, change: Change) -> None:
        with self._decoded(state) as opened:
            self.inner.rotate(opened, change)

    def mask(self, state: State, keep: Callable[[str, Tensor], Tensor]) -> None:
        with self._decoded(state) as opened:
            self.inner.mask({key: value for key, value in opened.items() if not key.endswith((CODES, SCALE))}, keep)

    @contextmanager
    def _decoded(self, state: State) -> Iterator[State]:
        """The state with the codes decoded; encoded again at the end, with whatever else has changed."""
        stored = [key.removesuffix(CODES) for key in state if key.endswith(CODES)]
        opened = state | {key: self.storage.decode(key, state) for key in stored}
        yield opened
        for key in stored:
            for name, value in self.storage.encode(key, tensor_of(opened, key)).items():
                assert isinstance(value, Tensor)
                tensor_of(state, name).copy_(value)
        state.update({key: value for key, value in opened.items() if key not in stored})


def is_square(key: str) -> bool:
    """Whether a state of this name holds squares, which are never negative: exp_avg_sq, square_avg and their kin."""
    return "_sq" in key or "square" in key
