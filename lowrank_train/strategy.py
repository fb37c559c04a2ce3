"""A memory strategy made whole from its choices: the only place where layers and optimizer meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.checkpoint_shards import whole_shape
from lowrank_train.config.errors import UserError
from lowrank_train.config.parts import instantiate
from lowrank_train.config.schema import StrategyConfig
from lowrank_train.kernels.rounding import Rounding
from lowrank_train.nn.events import Event, Layerwise, at_once
from lowrank_train.nn.int8 import Int8
from lowrank_train.nn.merge import Merge
from lowrank_train.nn.reparam import Weights, dense_state_dict, layers_of
from lowrank_train.optim.activity import is_trainable, put_to_sleep
from lowrank_train.optim.blocks import Blocks
from lowrank_train.optim.composed import rule_for_selected, stored
from lowrank_train.optim.exact_optimizer import bytes_by_kind
from lowrank_train.optim.fast_forward import FastForward
from lowrank_train.optim.groups import Group
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.moments_of import changing_weights, moments_of
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.refusals import When
from lowrank_train.optim.rounded_weights import RoundedWeights
from lowrank_train.optim.selection import matched_names, slots_for
from lowrank_train.optim.transform import Slot, Transform
from lowrank_train.reparametrising import merge_faults, swap_in
from lowrank_train.strategy_checks import row_head, taken_by_accident


@dataclass(frozen=True)
class Assignment:
    """What happens to one parameter, for the table that a run prints and for the planner."""

    name: str
    shape: tuple[int, ...]
    role: str  # "projected", "selected" (whole, by the inner rule), "rest" or "frozen"
    side: str  # "left", "right", "both", or "" where nothing is projected
    rank: int | None
    state_bytes: int
    residue_bytes: int = 0  # of them: what rounding leaves over of the weights, the same under every strategy


@dataclass
class Strategy:
    """How matrices are represented, which rule serves which parameter, when the step runs, and what happens between."""

    name: str
    weights: Weights | None  # None: dense, as the model has them
    merge: Merge | None
    select: list[str]  # patterns of parameter names
    selected: Transform | None  # the rule for what `select` matches; None: nothing is selected
    rest: Transform
    freeze_rest: bool  # what `select` does not match is not trained at all, but for the head of a task
    when: When
    basis_under_accumulation: Any
    state_dtype: torch.dtype | None  # None: each parameter's own
    seed: int
    rounding: Rounding = "nearest"  # of bfloat16 weights as they are updated
    repeat: FastForward | None = None  # repeats some updates while held-out rows get easier; None: none

    @classmethod
    def from_config(
        cls,
        config: StrategyConfig,
        *,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        rounding: Rounding = "nearest",
        int8_group: int | None = None,
        steps: int | None = None,
    ) -> Strategy:
        """Build the parts; a value that a part refuses is a UserError. `steps`: updates of the run, where known.

        int8_group: dense matrices of linear layers are kept in 8-bit codes, so many to a scale; None: as floats.
        """
        try:
            weights = None if config.weights is None else instantiate(config.weights)
            if weights is None and int8_group is not None:
                weights = Int8(group=int8_group)
            if weights is not None and steps is not None:
                weights.set_length(steps)
            merge = None if config.merge is None else instantiate(config.merge)
            selected = rule_for_selected(config, seed)
            rest = stored(instantiate(config.rest), config, of_rest=True)
            repeat = None if config.repeat is None else instantiate(config.repeat)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(
            name=config.name,
            weights=weights,
            merge=merge,
            select=list(config.select),
            selected=selected,
            rest=rest,
            freeze_rest=config.freeze_rest,
            when=config.when,
            basis_under_accumulation=config.basis_under_accumulation,
            state_dtype=state_dtype,
            seed=seed,
            rounding=rounding,
            repeat=repeat,
        )

    def prepare(self, model: nn.Module) -> None:
        """Bring the model into the form that is trained; dense weights need nothing but a valid selection.

        UserError for layers, ranks or patterns that do not fit.
        """
        if self.weights is not None:
            swap_in(model, self.weights, self.seed)
            faults = merge_faults(self.merge, layers_of(model)) if self.merge is not None else []
            if faults:
                raise UserError(faults)
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
        count_lost_updates: bool = False,
    ) -> TransformOptimizer:
        """The optimizer of every trainable parameter, each in exactly one group. UserError for what cannot be."""
        groups = self._groups(model)
        if self.merge is not None and self.merge.thins:
            unfit = sorted({type(group.transform).__name__ for group in groups if not group.transform.maskable})
            if unfit:
                raise UserError(
                    f"strategy.merge.moments={self.merge.moments}: {', '.join(unfit)} keeps no moment for each number "
                    "of a parameter, so that none can be made zero; use strategy.merge.moments=fresh or keep"
                )
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
                rounding=self.rounding,
                count_lost_updates=count_lost_updates,
                remember=self.repeat is not None,
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def regroup(self, model: nn.Module, optimizer: TransformOptimizer) -> None:
        """Let the optimizer serve what is trained now, where an event or a checkpoint has changed what that is."""
        trained = {param for param in model.parameters() if is_trainable(param)}
        if trained != optimizer.parameters:
            optimizer.regroup(self._groups(model))

    def group_names(self, model: nn.Module) -> list[str]:
        """Every group that the optimizer of a prepared model may ever have."""
        names = [] if self.selected is None else ["projected"]
        names += ["rest"] if not self.freeze_rest or row_head(model) else []
        return [group_name(name, ratio) for name in names for ratio in (1.0, *sorted(set(self._ratios().values())))]

    @property
    def events(self) -> list[Event]:
        """What happens outside the updates, in the order in which it happens after one of them."""
        if self.weights is None:
            return []
        merges = [] if self.merge is None else self.merge.events(self.seed, self.weights.begins_after_steps)
        return [*self.weights.events(), *merges]

    @torch.no_grad()
    def run_events(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, layerwise: Layerwise = at_once,
        held_out_loss: Callable[[], float] | None = None,
    ) -> list[Event]:  # fmt: skip
        """Everything that is due after update number `step`, counted from 1; what has happened, in order.
        held_out_loss: mean loss of the model as it is on a few rows that it is not trained on, alike on all ranks."""
        happened = []
        with changing_weights(optimizer):
            if self.repeat is not None and (count := self.repeat.after(step, optimizer, held_out_loss)):
                happened = [Event(f"update repeated x{count}", lambda number, layers, moments: None, step)]
        due = [event for event in self.events if event.due(step)]
        if due:
            layers, moments = layers_of(model), moments_of(optimizer)
            with changing_weights(optimizer):
                for index, event in enumerate(due):
                    for part, of_part in layerwise(event, layers, moments):
                        said = event.run(event.number(step), part, of_part)
                        if said is not None:
                            due[index] = replace(event, name=said, quiet=False)
            if isinstance(optimizer, TransformOptimizer):
                self.regroup(model, optimizer)
        return happened + due

    def dense_state_dict(self, model: nn.Module, arithmetic: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The plain dense weights that evaluation, export and everybody else sees; computed in `arithmetic`."""
        return dense_state_dict(model, arithmetic)

    def assignment(self, model: nn.Module) -> list[Assignment]:
        """One row a parameter; state is counted on the meta device, not estimated."""
        selected, rest = self._trained(model)
        slots = {slot.name: slot for slot in self._slots(selected) + self._slots(rest)}
        chosen = {name for name, _ in selected}
        rows = []
        for name, param in model.named_parameters():
            shape = tuple(whole_shape(param))
            if name not in slots:
                rows.append(Assignment(name, shape, "frozen", "", None, 0))
                continue
            transform = self.selected if name in chosen else self.rest
            assert transform is not None
            like = torch.empty(shape, dtype=param.dtype, device="meta")
            try:
                state = transform.init(like, slots[name])
            except ValueError as error:  # a rule that goes by names cannot say so of a shape alone
                raise UserError(str(error)) from None
            residue = RoundedWeights(self.rounding).state(like)
            state_bytes, residue_bytes = (sum(bytes_by_kind([kept]).values()) for kept in (state | residue, residue))
            state_bytes += 0 if self.repeat is None else like.numel() * like.element_size()  # as it was before
            rule = transform.rule if isinstance(transform, Blocks) else transform
            if isinstance(rule, InSubspace):
                side, rank = rule.subspace.side_of(state, param.shape), rule.subspace.rank_for(param.shape)
                rows.append(Assignment(name, shape, "projected", side, rank, state_bytes, residue_bytes))
            else:
                role = "selected" if name in chosen else "rest"
                rows.append(Assignment(name, shape, role, "", None, state_bytes, residue_bytes))
        return rows

    def _groups(self, model: nn.Module) -> list[Group]:
        """Every trained parameter in exactly one group: by its rule, and by its multiple of the learning rate."""
        selected, rest = self._trained(model)
        kept = {name for name, _ in rest}
        for name, param in self._split(model)[1]:
            if name not in kept:
                put_to_sleep(param)
        ratios = self._ratios()
        groups = []
        for name, transform, params in (("projected", self.selected, selected), ("rest", self.rest, rest)):
            for ratio in (1.0, *sorted(set(ratios.values()))):
                members = [item for item in params if ratios.get(item[0].rpartition(".")[2], 1.0) == ratio]
                if members:
                    assert transform is not None
                    groups.append(Group(group_name(name, ratio), transform, members, self._slots(members), ratio))
        return groups

    def _trained(self, model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """As `_split`, without what `freeze_rest` freezes: all but the head of a task, whose numbers begin random."""
        selected, rest = self._split(model)
        head = row_head(model) if self.freeze_rest else None
        return selected, [item for item in rest if head is None or item[0] in head]

    def _ratios(self) -> Mapping[str, float]:
        """Last part of a parameter's name -> multiple of the learning rate, where it is not 1."""
        return {} if self.weights is None else self.weights.lr_ratios()

    def _slots(self, params: list[tuple[str, Tensor]]) -> list[Slot]:
        return slots_for(params, seed=self.seed, state_dtype=self.state_dtype)

    def _split(self, model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """Trainable parameters inside and outside the subspace. UserError when the selection does not fit."""
        params: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if is_trainable(p)]
        if self.selected is None:
            return [], params
        chosen, faults = matched_names([name for name, _ in params], self.select, "strategy.select")
        faults += taken_by_accident(model, self.select, chosen)
        faults += [fault for name, param in params if name in chosen for fault in self._misfit(name, param)]
        if not self.select:
            faults.append(f"strategy.select is empty, but strategy {self.name} has a rule for chosen matrices")
        if isinstance(self.selected, Blocks) and not faults:
            faults = self.selected.schedule.misfits(tuple(name for name, _ in params if name in chosen))
        if faults:
            raise UserError(faults)
        return [item for item in params if item[0] in chosen], [item for item in params if item[0] not in chosen]

    def _misfit(self, name: str, param: Tensor) -> list[str]:
        rule = self.selected.rule if isinstance(self.selected, Blocks) else self.selected
        if isinstance(rule, InSubspace) and param.ndim != 2:
            return [
                f"strategy.select takes in {name} of shape {tuple(param.shape)}, but only matrices can be projected"
            ]
        fault = rule.misfit(param.shape) if rule is not None else None
        return [f"{name} of shape {tuple(param.shape)}: {fault}"] if fault else []


def group_name(name: str, ratio: float) -> str:
    """`rest`, or `rest_x16` for what learns 16 times as fast."""
    return name if ratio == 1 else f"{name}_x{ratio:g}"
