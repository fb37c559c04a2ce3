"""LaMDA: a small trained matrix between singular vectors of W0, those on the output's side trained for a while."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lowrank_train.nn.events import Event, each
from lowrank_train.nn.reparam import Origin, ReparamLinear, uniform
from lowrank_train.nn.three_factors import Factor, SVFit, ThreeFactorsLinear, leading


@dataclass
class LaMDA(SVFit):
    """W = W' + s L C R, s = alpha / rank; C is trained, R is kept; L is trained at first (Azizi et al., 2406.12832).

    The columns of L are frozen one stage after the other, those of the largest singular values first, evenly over the
    first `freeze_steps` updates; after them C alone is trained.
    """

    rank: int = 64
    alpha: float = 16.0
    # spectral: L C R = U_r S_r V_r^T / s of W0 = U S V^T with C = I, which W' lacks of W0; random, as the published
    # code: L = 0, C and R uniform in +-1/sqrt(rank) and +-1/sqrt(in), W' = W0
    init: Literal["spectral", "random"] = "spectral"
    freeze_share: float = 0.3  # of a run, after which L is kept whole: eta of the published code
    freeze_steps: int | None = None  # updates, where that is not said by freeze_share
    stages: int = 8  # in which the columns are frozen

    trained: ClassVar[tuple[Factor, ...]] = ("left", "core")
    diagonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 0:
            raise ValueError(f"strategy.weights.alpha is {self.alpha}; it must be above 0")
        if not 0 < self.freeze_share <= 1:
            raise ValueError(f"strategy.weights.freeze_share is {self.freeze_share}; it must lie in (0, 1]")
        if self.freeze_steps is not None and self.freeze_steps < 1:
            raise ValueError(f"strategy.weights.freeze_steps is {self.freeze_steps}; it must be at least 1")
        if not 1 <= self.stages <= self.rank:
            raise ValueError(f"strategy.weights.stages is {self.stages}; it must lie in [1, strategy.weights.rank]")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def set_length(self, steps: int) -> None:
        if self.freeze_steps is None:
            self.freeze_steps = max(1, round(steps * self.freeze_share))

    def factors(self, weight: Tensor, origin: Origin) -> tuple[Tensor, Tensor, Tensor]:
        rank = self.rank
        if self.init == "spectral":
            left, values, right = leading(weight, rank)
            root = (values / self.scale).sqrt()
            return left * root, torch.eye(rank, dtype=weight.dtype, device=weight.device), root[:, None] * right
        core = uniform((rank, rank), 1 / math.sqrt(rank), weight, origin.generator("core"))
        right = uniform((rank, weight.shape[1]), 1 / math.sqrt(weight.shape[1]), weight, origin.generator("right"))
        return weight.new_zeros(weight.shape[0], rank), core, right

    def build(self, linear: nn.Linear, origin: Origin) -> ReparamLinear:
        return LaMDALinear(linear, self, origin)

    def events(self) -> Sequence[Event]:
        if self.freeze_steps is None:
            raise ValueError("strategy.weights.freeze_steps is null, and the length of the run is not known; give it")

        def freeze(layer: LaMDALinear, number: int, moments: Any, stage: int) -> None:
            layer.freeze_(stage)

        return [
            Event(
                "columns frozen",
                each(LaMDALinear, functools.partial(freeze, stage=stage)),
                math.ceil(self.freeze_steps * stage / self.stages),
                restructures=True,
            )
            for stage in range(1, self.stages + 1)
        ]


class LaMDALinear(ThreeFactorsLinear):
    """A ThreeFactorsLinear whose L is kept as `columns`, a parameter for each stage of the freezing.

    So columns that are frozen have no gradient and no moments, like any other parameter that is not trained.
    `stages_done` counts their stages.
    """

    choice = LaMDA
    weights: LaMDA

    def keep_left_(self, left: Tensor) -> None:
        groups = left.tensor_split(self.weights.stages, dim=1)
        self.columns = nn.ParameterList([nn.Parameter(group.contiguous()) for group in groups])
        self.stages_done: Tensor
        self.register_buffer("stages_done", torch.zeros((), dtype=torch.int64, device=left.device))

    def whole_left(self) -> Tensor:
        return torch.cat(list(self.columns), dim=1)

    def freeze_(self, stages: int) -> None:
        """Keep the columns of the first `stages` stages, and train the others."""
        self.stages_done.fill_(stages)
        for number, group in enumerate(self.columns):
            group.requires_grad_(number >= stages)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if not self.stages_done.is_meta:
            self.freeze_(int(self.stages_done.item()))
