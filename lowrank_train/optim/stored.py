"""State in few bits: a rule whose large state tensors are kept narrow and decoded around every use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lowrank_train.kernels.adam_8bit import adam_8bit_step
from lowrank_train.kernels.dispatch import is_tile, runs_kernel
from lowrank_train.kernels.pieces import PIECE_ELEMENTS
from lowrank_train.optim import state_formats
from lowrank_train.optim.direction import Direction
from lowrank_train.optim.moments import Adam, Lion, Momentum, RmsProp
from lowrank_train.optim.state_formats import CODES_OF, SCALE, Format, piece_of, stored_in
from lowrank_train.optim.transform import Change, Rates, Slot, State, Transform, counter, tensor_of

CODES = ".q8"  # of 8-bit dynamic codes, which kernels read
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
ELEMENTWISE = (Adam, Lion, Momentum, RmsProp)
"""Rules that treat each number by itself, and so can be run on a part of a tensor; not what is derived from them."""


@dataclass
class Storage:
    """In which format each piece of the state is stored: fp32, bf16, or codes with one float32 scale a block.

    q8: 8-bit codes of a dynamic code book (arXiv 2110.02861). q8_linear: 8-bit codes that are evenly spread. q4: 4-bit
    codes, two to a byte, dynamic for signed numbers and linear without 0 for squares (arXiv 2309.01507). A number takes
    1 + 4 / block or 1/2 + 4 / block_q4 bytes. Tensors of fewer than `min_elements` numbers stay in float32, since they
    cost next to nothing and are often the ones that need digits, such as norms.
    """

    first: Format = "q8"  # averages of the gradient: Adam's and Lion's first moments, momentum
    second: Format = "q8"  # averages of its squares
    other: Format = "q8"  # whatever else a rule keeps, such as earlier gradients
    basis: Literal["fp32", "bf16", "q8", "q4"] | None = None  # of a subspace; null: as precision.state says
    min_elements: int = 4096  # bitsandbytes' min_8bit_size
    block: int = 256  # numbers that share a scale, 8 bits
    block_q4: int = 128  # the same, 4 bits
    keep_nonzero: bool = True  # a second moment too small for the code book becomes its least number instead of 0
    rest: bool = True  # also the state of all parameters that are not selected, the embedding's included
    table: bool = False  # round as bitsandbytes does on the CPU, to replay what it recorded

    def __post_init__(self) -> None:
        for name in ("min_elements", "block", "block_q4"):
            if getattr(self, name) < 1:
                raise ValueError(f"strategy.storage.{name} is {getattr(self, name)}; it must be at least 1")
        if self.block_q4 % 2:
            raise ValueError(f"strategy.storage.block_q4 is {self.block_q4}; it must be even, two codes share a byte")

    def format_of(self, key: str, value: Tensor | int) -> Format:
        """fp32 for what is left as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < self.min_elements:
            return "fp32"
        formats: dict[str, Format] = {"first": self.first, "second": self.second, "other": self.other}
        return formats[piece_of(key)]

    def block_of(self, fmt: str) -> int:
        """Numbers that share a scale; 1 where there is none."""
        return 1 if fmt not in CODES_OF else self.block_q4 if CODES_OF[fmt].bits == 4 else self.block

    def decode(self, key: str, state: State) -> Tensor:
        """The tensor of this name, in float32."""
        fmt = stored_in(state)[key]
        return state_formats.decode(key, fmt, state, self.block_of(fmt))


@dataclass
class Stored(Transform):
    """`inner` with its state stored by `storage`: decode, update, encode. The direction is made of what is not encoded.

    A state tensor `exp_avg` becomes `exp_avg.q8` (uint8, of its shape) and `exp_avg.scale` (one a block), or
    `exp_avg.q4` with its sizes beside, or `exp_avg.bf16`. While an update runs, the state of this one parameter exists
    in float32 beside the codes; that of a rule that goes number by number, and serves the whole parameter, only piece
    by piece.
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
            fmt = self.storage.format_of(key, value)
            if fmt == "fp32":
                state[key] = value
                continue
            assert isinstance(value, Tensor)
            state |= state_formats.empty(key, fmt, value, self.storage.block_of(fmt))
            counted = type(value) is not Tensor or value.is_meta
            if not counted and value.any():  # for most rules state begins with zeros
                self._encode(key, fmt, value, state)
        return state

    def misfit(self, shape: torch.Size) -> str | None:
        return self.inner.misfit(shape)

    def row_wise(self, param: Tensor, slot: Slot) -> bool:
        """Where nothing is stored narrow: the blocks that share a scale do not end with the rows."""
        state = self.inner.init(torch.empty_like(param, device="meta"), slot)
        stored = any(self.storage.format_of(key, value) != "fp32" for key, value in state.items())
        return not stored and self.inner.row_wise(param, slot)

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
        block = math.lcm(*(self.storage.block_of(fmt) for fmt in stored_in(state).values()))
        size = max(1, PIECE_ELEMENTS["cuda" if param.is_cuda else "cpu"] // block) * block
        after = state
        for start in range(0, param.numel(), size):
            part = self._part(state, start, min(size, param.numel() - start))
            with self._decoded(part) as opened:
                flat_grad, flat_param = (tensor.view(-1)[start : start + size] for tensor in (compressed, param))
                self.inner.apply(flat_grad, opened, flat_param, rates, decay)
            after = part
        state.update(self._counters(after))

    def _has_kernel(self, compressed: Tensor, state: State, param: Tensor) -> bool:
        """Whether one kernel does the whole step: that of Adam, of whose moments both are in 8-bit dynamic codes."""
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

    def _part(self, state: State, start: int, length: int) -> State:
        """Views of `length` numbers from `start` on of every state tensor, which the rule has one of for each number.

        With the integers as they are: each piece counts its step from the same number.
        """
        own, part = self._own(state), self._counters(state)
        part |= {key: value.view(-1)[start : start + length] for key, value in own.items() if isinstance(value, Tensor)}
        for name, fmt in stored_in(state).items():
            part |= state_formats.part(name, fmt, state, start, length, self.storage.block_of(fmt))
        return part

    @staticmethod
    def _own(state: State) -> State:
        """What is not part of a stored tensor."""
        taken = {key for name, fmt in stored_in(state).items() for key in state_formats.keys_of(name, fmt, state)}
        return {key: value for key, value in state.items() if key not in taken}

    def _counters(self, state: State) -> State:
        return {key: value for key, value in self._own(state).items() if isinstance(value, int)}

    def decay_scale(self, param: Tensor) -> Tensor | float:
        return self.inner.decay_scale(param)

    def rotate(self, state: State, change: Change) -> None:
        with self._decoded(state) as opened:
            self.inner.rotate(opened, change)

    def mask(self, state: State, keep: Callable[[str, Tensor], Tensor]) -> None:
        with self._decoded(state) as opened:
            names = {*self._own(state), *stored_in(state)}
            self.inner.mask({key: value for key, value in opened.items() if key in names}, keep)

    @contextmanager
    def _decoded(self, state: State) -> Iterator[State]:
        """The state with the stored tensors decoded; encoded again at the end, with whatever else has changed."""
        stored = stored_in(state)
        opened = state | {name: self.storage.decode(name, state) for name in stored}
        yield opened
        for name, fmt in stored.items():
            self._encode(name, fmt, tensor_of(opened, name), state)
        state.update({key: value for key, value in opened.items() if key not in stored})

    def _encode(self, name: str, fmt: str, value: Tensor, state: State) -> None:
        block, keep_nonzero, table = self.storage.block_of(fmt), self.storage.keep_nonzero, self.storage.table
        state_formats.encode_(name, fmt, value, state, block, keep_nonzero=keep_nonzero, table=table)
