"""A memory strategy made whole from its choices: the only place where layers and optimizer meet."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.config.errors import UserError
from lowrank_train.config.parts import instantiate
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.config.seeding import seed_from_name
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Lift
from lowrank_train.optim.optimizer import Group, TransformOptimizer, When
from lowrank_train.optim.subspace.base import Subspace, resolve_side
from lowrank_train.optim.transform import Slot, Transform


@dataclass(frozen=True)
class Assignment:
    """What happens to one parameter, for the table that a run prints and for the planner."""

    name: str
    shape: tuple[int, ...]
    role: str  # "projected", "selected" (whole, by the inner rule), "rest" or "frozen"
    side: str  # "left", "right", "both", or "" where nothing is projected
    rank: int | None
    state_bytes: int


@dataclass
class Strategy:
    """Which parameters the subspace applies to, the rules for them and for the rest, and when the step runs."""

    name: str
    select: list[str]  # patterns of parameter names
    selected: Transform | None  # the rule for what `select` matches; None: nothing is selected
    rest: Transform
    when: When
    basis_under_accumulation: Any
    state_dtype: torch.dtype | None  # None: each parameter's own
    seed: int

    @classmethod
    def from_config(cls, config: StrategyConfig, *, state_dtype: torch.dtype | None = None, seed: int = 0) -> Strategy:
        """Build the parts; a value that a part refuses is a UserError."""
        try:
            selected = rule_for_selected(config)
            rest = instantiate(config.rest)
            assert isinstance(rest, Transform)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(
            name=config.name,
            select=list(config.select),
            selected=selected,
            rest=rest,
            when=config.when,
            basis_under_accumulation=config.basis_under_accumulation,
            state_dtype=state_dtype,
            seed=seed,
        )

    def prepare(self, model: nn.Module) -> None:
        """Bring the model into the form that is trained; dense weights need nothing but a valid selection."""
        self._split(model)

    def optimizer(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        grad_clip: float | None = None,
        clip_norm_of: Any = "full",
        micro_batches: int = 1,
    ) -> TransformOptimizer:
        """The optimizer of every trainable parameter, each in exactly one group. UserError for what cannot be."""
        selected, rest = self._split(model)
        groups = []
        for name, transform, params in (("projected", self.selected, selected), ("rest", self.rest, rest)):
            if params:
                assert transform is not None
                groups.append(Group(name, transform, params, self._slots(params)))
        try:
            return TransformOptimizer(
                groups,
                lr=lr,
                weight_decay=weight_decay,
                when=self.when,
                grad_clip=grad_clip,
                clip_norm_of=clip_norm_of,
                micro_batches=micro_batches,
                basis_under_accumulation=self.basis_under_accumulation,
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def dense_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The plain dense weights that evaluation, export and everybody else sees."""
        return model.state_dict()

    def assignment(self, model: nn.Module) -> list[Assignment]:
        """One row a parameter; state is counted on the meta device, not estimated."""
        selected = dict(self._split(model)[0])
        rows = []
        for name, param in model.named_parameters():
            shape = tuple(param.shape)
            if not param.requires_grad:
                rows.append(Assignment(name, shape, "frozen", "", None, 0))
                continue
            transform = self.selected if name in selected else self.rest
            assert transform is not None
            like = torch.empty(shape, dtype=param.dtype, device="meta")
            state = transform.init(like, self._slots([(name, param)])[0])
            state_bytes = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
            if isinstance(transform, InSubspace):
                side, rank = resolve_side(transform.subspace.side, shape), transform.subspace.rank_for(param.shape)
                rows.append(Assignment(name, shape, "projected", side, rank, state_bytes))
            else:
                role = "selected" if name in selected else "rest"
                rows.append(Assignment(name, shape, role, "", None, state_bytes))
        return rows

    def _slots(self, params: list[tuple[str, Tensor]]) -> list[Slot]:
        rank_of = {name: index for index, name in enumerate(sorted(name for name, _ in params))}
        return [
            Slot(
                name=name,
                seed=seed_from_name(self.seed, name),
                phase=rank_of[name] / len(params),
                dtype=self.state_dtype or param.dtype,
            )
            for name, param in params
        ]

    def _split(self, model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """Trainable parameters inside and outside the subspace. UserError when the selection does not fit."""
        params: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if self.selected is None:
            return [], params
        faults, chosen = [], set()
        for pattern in self.select:
            matched = [name for name, _ in params if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                nearest = difflib.get_close_matches(pattern, [name for name, _ in params], n=1, cutoff=0.0)
                faults.append(
                    f"strategy.select pattern {pattern!r} matched no parameter; nearest: {', '.join(nearest)}"
                )
            chosen.update(matched)
        faults += [fault for name, param in params if name in chosen for fault in self._misfit(name, param)]
        if not self.select:
            faults.append(f"strategy.select is empty, but strategy {self.name} has a rule for chosen matrices")
        if faults:
            raise UserError(faults)
        return [item for item in params if item[0] in chosen], [item for item in params if item[0] not in chosen]

    def _misfit(self, name: str, param: Tensor) -> list[str]:
        if not isinstance(self.selected, InSubspace):
            return []
        if param.ndim != 2:
            return [
                f"strategy.select takes in {name} of shape {tuple(param.shape)}, but only matrices can be projected"
            ]
        fault = self.selected.subspace.misfit(param.shape)
        return [f"{name} of shape {tuple(param.shape)}: {fault}"] if fault else []


def rule_for_selected(config: StrategyConfig) -> Transform | None:
    """The composition of the parts; None for a strategy that treats all parameters alike. ValueError for a misfit."""
    if config.inner is None:
        if config.subspace is not None:
            raise ValueError(f"strategy {config.name} has a subspace but no inner rule; choose strategy/inner=NAME")
        return None
    inner = instantiate(config.inner)
    assert isinstance(inner, Transform)
    if config.subspace is None:
        return inner
    if config.lift is None:
        raise ValueError(f"strategy {config.name} has a subspace but no lift; choose strategy/lift=NAME")
    subspace, lift = instantiate(config.subspace), instantiate(config.lift)
    feedback = None if config.feedback is None else instantiate(config.feedback)
    assert isinstance(subspace, Subspace) and isinstance(lift, Lift)
    return InSubspace(subspace, inner, lift, config.on_refresh, feedback)
