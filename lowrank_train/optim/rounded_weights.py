"""Updates of narrow weights that are not lost: made in float32, and written back at random or with the rest kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowrank_train.config.seeding import seed_from_name
from lowrank_train.kernels.int8_weight import Int8Weight
from lowrank_train.kernels.pieces import pieces
from lowrank_train.kernels.rounding import Rounding, write_rounded_
from lowrank_train.optim.transform import Rates, Slot, State, Transform, counter, tensor_of

RESIDUE, WRITTEN = "residue", "times_written"
KEYS = (RESIDUE, WRITTEN)


class RoundedWeights:
    """How the bfloat16 and int8 parameters of an optimizer take up their updates; all others are updated in place.

    nearest: the rule updates them in place too, so that every operation rounds to the nearest.
    stochastic: w <- up or down from the rule's result on float(w), with the probability that makes the mean right
        (Zamirai et al., arXiv 2010.06192). The bits follow from the slot's seed and the number of this write.
    compensated: e = the rule's result on float(w) + float(r);  w <- e to the nearest;  r <- e - w, in bfloat16 (Kahan's
        summation, same paper). r belongs to the value of w: whoever changes w otherwise calls `renew`. Not for int8.

    An int8 parameter is decoded, updated and encoded with new scales under any rounding: at random (Q-GaLore, arXiv
    2407.08296, section 3.4) or to the nearest.

    While a parameter is updated it exists in float32 besides: 4 bytes a number of this one parameter. What is kept
    between updates is no business of its rule, which may drop its own state as it likes.
    """

    def __init__(self, rounding: Rounding, count_lost: bool = False) -> None:
        self.rounding: Rounding = rounding
        self.count_lost = count_lost  # with rounding=nearest the rule then runs twice, once on copies of all it changes
        self._kept: dict[Tensor, State] = {}

    def state(self, param: Tensor) -> State:
        """What is kept for a parameter between updates, made where it is not there yet."""
        key = self._key(param)
        if key is None:
            return {}
        kept = self._kept.setdefault(param, {})
        if key not in kept:
            kept[key] = torch.zeros_like(param) if key == RESIDUE else 0
        return kept

    def existing(self, param: Tensor) -> State:
        """As `state`, without making it."""
        return self._kept.get(param, {})

    def restore(self, param: Tensor, saved: State) -> None:
        """Go on with what was kept when it was saved; what this rounding has no use for is left out."""
        key = self._key(param)
        self._kept.pop(param, None)
        if key is not None and key in saved:
            self._kept[param] = {key: saved[key]}

    def renew(self, param: Tensor) -> None:
        """The parameter has been given other values: what was left over of the old ones is void."""
        self.existing(param).pop(RESIDUE, None)

    @contextmanager
    def changed_within(self) -> Iterator[None]:
        """Renews the parameters that are changed in place within."""
        versions = {param: param._version for param in self._kept}
        yield
        for param, version in versions.items():
            if param._version != version:
                self.renew(param)

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Free what belongs to parameters that are gone."""
        served = set(params)
        self._kept = {param: kept for param, kept in self._kept.items() if param in served}

    def at_once(
        self,
        rule: Transform,
        grad: Tensor | None,
        state: State,
        param: Tensor,
        slot: Slot,
        rates: Rates,
        decay: Tensor | float,
        grad_factor: float,
    ) -> Tensor | None:
        """rule.at_once, rounded; None, and nothing done, also without a gradient or where the sum itself is asked for.

        Random bits are those of the whole matrix, as lifted_update_ draws them. Int8 weights go from codes to codes.
        """
        counts = self.count_lost and (param.dtype is torch.bfloat16 or isinstance(param, Int8Weight))
        if grad is None or counts or self._key(param) == RESIDUE:
            return None
        kept = self.state(param)
        seed = seed_from_name(slot.seed, f"rounding {counter(kept, WRITTEN) + 1}") if kept else None
        low_norm = rule.at_once(grad, state, param, rates, decay, grad_factor, seed)
        if low_norm is not None and kept:
            kept[WRITTEN] = counter(kept, WRITTEN) + 1
        return low_norm

    def apply(
        self,
        rule: Transform,
        compressed: Tensor,
        state: State,
        param: Tensor,
        slot: Slot,
        rates: Rates,
        decay: Tensor | float,
        grad: Tensor | None,
    ) -> Tensor | None:
        """rule.apply, rounded; returns how many weights an update that was not zero has left as they were, if counted.

        What a weight lacks counts as part of it: a change of the residue alone is not lost.
        """
        if isinstance(param, Int8Weight):
            return self._apply_coded(rule, compressed, state, param, slot, rates, decay, grad)
        counts = self.count_lost and param.dtype is torch.bfloat16
        kept = self.state(param)
        if not kept and not counts:
            rule.apply(compressed, state, param, rates, decay, grad)
            return None
        held = [param, *(value for value in kept.values() if isinstance(value, Tensor))]
        before = [tensor.clone() for tensor in held] if counts else []
        exact = _sum(held)
        if not kept:
            whole = None if grad is None else grad.clone()
            rule.apply(compressed.clone(), _copied(state), exact, rates, decay, whole)
            rule.apply(compressed, state, param, rates, decay, grad)
        else:
            rule.apply(compressed, state, exact, rates, decay, grad)
            self._write(param, exact, kept, slot)
        return _lost(before, exact, held) if counts else None

    def _apply_coded(
        self,
        rule: Transform,
        compressed: Tensor,
        state: State,
        param: Int8Weight,
        slot: Slot,
        rates: Rates,
        decay: Tensor | float,
        grad: Tensor | None,
    ) -> Tensor | None:
        """`apply` for codes. An update is lost on a weight that stays as many steps from 0 as it was."""
        kept, exact = self.state(param), param.decoded()
        before, steps = (exact.clone(), param.steps()) if self.count_lost else (None, None)
        rule.apply(compressed, state, exact, rates, decay, grad)
        param.store_(exact, seed=self._next_seed(kept, slot) if kept else None)
        if before is None:
            return None
        return ((exact != before) & (param.steps() == steps)).sum()

    def _next_seed(self, kept: State, slot: Slot) -> int:
        number = kept[WRITTEN] = counter(kept, WRITTEN) + 1
        return seed_from_name(slot.seed, f"rounding {number}")

    def _key(self, param: Tensor) -> str | None:
        coded = isinstance(param, Int8Weight)
        if coded and self.rounding == "compensated":
            raise ValueError("rounding=compensated has nowhere to keep the rest of int8 weights; use stochastic")
        if self.rounding == "nearest" or not (coded or param.dtype is torch.bfloat16):
            return None
        return WRITTEN if self.rounding == "stochastic" else RESIDUE

    def _write(self, param: Tensor, exact: Tensor, kept: State, slot: Slot) -> None:
        if self.rounding == "compensated":
            write_rounded_(param, exact, tensor_of(kept, RESIDUE))
            return
        write_rounded_(param, exact, seed=self._next_seed(kept, slot))


def _sum(narrow: list[Tensor]) -> Tensor:
    """The weights, with what they lack where that is kept, in float32: a new tensor."""
    total = narrow[0].float()
    for residue in narrow[1:]:
        total += residue
    return total


def _copied(state: State) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _lost(before: list[Tensor], exact: Tensor, after: list[Tensor]) -> Tensor:
    """How many weights stayed what they were though their update was not zero."""
    lost = torch.zeros((), dtype=torch.int64, device=exact.device)
    for total, *narrow in pieces(exact, *before, *after):
        start, end = _sum(narrow[: len(before)]), _sum(narrow[len(before) :])
        lost += ((total != start) & (end == start)).sum()
    return lost
