"""The search for what fits: the largest micro-batch, else the cheapest changes; each candidate is really planned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.cards import Card
from lowrank_train.memory.changes import (
    Axis,
    Change,
    axes,
    changed,
    larger_update,
    micro_batch,
    refusal,
    rows_of_update,
)
from lowrank_train.memory.plan import Plan, kept_bytes, planned, vocabulary

Words = Mapping[str, str]

WORTH_IT = 0.01
"""Share of the need that a change must save to be taken."""
LARGEST_UPDATE = 16
"""Times the rows of the update, up to which one larger micro-batch is looked for."""


@dataclass(frozen=True)
class Tried:
    """A change that was planned, beside the plan before it."""

    axis: str
    words: Words
    price: str
    needed_bytes: int
    saved_bytes: int  # against what was kept before it
    fits: bool


@dataclass
class Fit:
    """What was found."""

    as_it_is: Plan
    tried: list[Tried] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # words -> reason
    words: Words = field(default_factory=dict)  # to add to the command line; where nothing fits, what comes nearest
    plan: Plan | None = None  # with these words
    larger: Plan | None = None  # a single micro-batch of more rows than the update has

    @property
    def fits(self) -> bool:
        return self.plan is not None and does_fit(self.plan)


class Search:
    """Plans of one configuration under changes, each made once."""

    def __init__(self, config: RunConfig, card: Card, said: Callable[[str], None] = lambda _: None) -> None:
        """`said` hears of each candidate before it is planned."""
        self.config, self.card, self._said = copy.deepcopy(config), card, said
        self.found = Fit(planned(config, card))
        self.vocab_size = vocabulary(config, [])
        if config.model.kind == "llama":
            self.config.model.vocab_size = self.vocab_size  # the tokenizer is read once
        self._plans: dict[str, Plan | None] = {"": self.found.as_it_is}

    def plan(self, words: Words) -> Plan | None:
        """The plan with these words at the end of the command line; None where the run would be refused."""
        key = written(words)
        if key not in self._plans:
            config = self._allowed(words)
            self._said(key)
            self._plans[key] = None if config is None else self._planned(config, key)
        return self._plans[key]

    def fit(self) -> Fit:
        """The largest micro-batch where one fits; else changes until one does, and then the largest again."""
        found, update = self.found, rows_of_update(self.config)
        sizes = [rows for rows in range(1, update + 1) if update % rows == 0]
        words = self._largest(sizes, {}, micro_batch)
        if words is None:
            words = self._changed_to_fit(self._smallest(sizes))
            words = self._largest(sizes, words, micro_batch) or words
        elif self.config.trainer.batch_size == update:
            beyond = self._largest([update, *range(update + 1, LARGEST_UPDATE * update + 1)], {}, larger_update)
            found.larger = self.plan(beyond) if beyond else None
        found.words, found.plan = words, self.plan(words)
        return found

    def savings(self, count: int) -> list[Tried]:
        """The cheapest changes that each save something by itself, at most so many."""
        before, saving = self.found.as_it_is, []
        rows, update = self.config.trainer.batch_size, rows_of_update(self.config)
        halves = [micro_batch(self.config, size) for size in range(rows // 2, 0, -1) if update % size == 0][:1]
        for axis in (Axis("micro-batch", halves), *axes(self.config)):
            changes = self._lowering({}, axis.changes) if axis.of_what_is_kept else axis.changes
            for change in changes:
                tried = self._try(axis.name, before, {}, change)
                if tried is not None and tried.saved_bytes >= WORTH_IT * before.peak_bytes:
                    saving.append(tried)
                    break
            if len(saving) == count:
                break
        return saving

    def _allowed(self, words: Words) -> RunConfig | None:
        config = changed(self.config, words)
        reason = refusal(config, self.vocab_size)
        if reason is not None:
            self.found.refused[written(words)] = reason
        return config if reason is None else None

    def _planned(self, config: RunConfig, key: str) -> Plan | None:
        try:
            return planned(config, self.card)
        except UserError as error:
            self.found.refused[key] = error.faults[0]
            return None

    def _try(self, axis: str, before: Plan, kept: Words, change: Change) -> Tried | None:
        plan = self.plan({**kept, **change.words})
        if plan is None:
            return None
        saved = before.needed_bytes - plan.needed_bytes
        tried = Tried(axis, change.words, change.price, plan.needed_bytes, saved, does_fit(plan))
        self.found.tried.append(tried)
        return tried

    def _largest(self, sizes: Sequence[int], kept: Words, words_of: Callable[[RunConfig, int], Change]) -> Words | None:
        """What is kept, with the most rows of these that fit; None where none do.

        What is needed grows with the rows, almost along a line: each guess follows the line through two plans, and the
        answer and the size above it have both been planned.
        """
        sizes, present = list(sizes), changed(self.config, kept).trainer.batch_size
        plans: dict[int, Plan] = {}
        low, high = -1, len(sizes)  # fits, does not fit
        first = self.plan(kept)
        if first is not None and present in sizes:
            plans[present] = first
            low, high = (sizes.index(present), high) if does_fit(first) else (low, sizes.index(present))
        turns = 0
        while high - low > 1:
            turns += 1
            middle = (low + high) // 2
            index = middle if turns % 4 == 0 else min(max(_guess(sizes, plans, self.card, low), low + 1), high - 1)
            plan = self.plan({**kept, **words_of(self.config, sizes[index]).words})
            if plan is None:
                del sizes[index]
                high -= 1
                continue
            plans[sizes[index]] = plan
            low, high = (index, high) if does_fit(plan) else (low, index)
        if low < 0:
            return None
        return kept if sizes[low] == present else {**kept, **words_of(self.config, sizes[low]).words}

    def _smallest(self, sizes: Sequence[int]) -> Words:
        """The words for the smallest micro-batch that is not refused; none where it is the present one."""
        for rows in sizes:
            change = micro_batch(self.config, rows)
            if rows == self.config.trainer.batch_size:
                return {}
            if self._try("micro-batch", self.found.as_it_is, {}, change) is not None:
                return change.words
        return {}

    def _changed_to_fit(self, smallest: Words) -> Words:
        """Take from each axis the first change that makes the run fit, else the one that saves most, until it fits."""
        taken = [smallest]
        for axis in axes(self.config):
            kept, before = _together(taken), self.plan(_together(taken))
            assert before is not None
            changes = self._lowering(kept, axis.changes) if axis.of_what_is_kept else axis.changes
            best: Tried | None = None
            for change in changes:
                tried = self._try(axis.name, before, kept, change)
                if tried is not None and (best is None or tried.needed_bytes < best.needed_bytes):
                    best = tried
                if tried is not None and tried.fits:
                    break
            if best is not None and (best.fits or best.saved_bytes >= WORTH_IT * before.needed_bytes):
                taken.append(best.words)
                if best.fits:
                    return self._without_needless(taken)
        return _together(taken)

    def _without_needless(self, taken: list[Words]) -> Words:
        """What fits without some of its changes, the dearest of them left out first."""
        for words in taken[-2:0:-1]:
            fewer = [item for item in taken if item is not words]
            plan = self.plan(_together(fewer))
            if plan is not None and does_fit(plan):
                taken = fewer
        return _together(taken)

    def _lowering(self, kept: Words, changes: Sequence[Change]) -> list[Change]:
        """Those that lower what is kept between updates, each below the one before it: counted, so quickly known.

        Of those whose saving could not make the run fit, only the last: it is the one to go on from.
        """
        before = self.plan(kept)
        assert before is not None
        least = before.persistent_bytes
        found: list[tuple[Change, bool]] = []
        for change in changes:
            config = self._allowed({**kept, **change.words})
            count = least if config is None else sum(kept_bytes(config, self.vocab_size).values())
            if count < least:
                could_fit = before.needed_bytes - (before.persistent_bytes - count) <= self.card.usable_bytes
                found.append((change, could_fit))
                least = count
        return [change for number, (change, could_fit) in enumerate(found, 1) if could_fit or number == len(found)]


def does_fit(plan: Plan) -> bool:
    """Known to fit the first card of its verdicts."""
    return plan.verdicts[0].fits is True


def written(words: Words) -> str:
    """As on the command line."""
    return " ".join(f"{key}={value}" for key, value in words.items())


def _together(taken: Sequence[Words]) -> Words:
    return {key: value for words in taken for key, value in words.items()}


def _guess(sizes: Sequence[int], plans: Mapping[int, Plan], card: Card, low: int) -> int:
    """The place of the largest size that fits, by the line through the two plans nearest to the card's memory."""
    if len(plans) < 2:
        return low + 1
    near = sorted(plans, key=lambda size: abs(plans[size].needed_bytes - card.usable_bytes))[:2]
    (left, at_left), (right, at_right) = sorted((size, plans[size].needed_bytes) for size in near)
    slope = (at_right - at_left) / (right - left)
    reach = left + (card.usable_bytes - at_left) / slope if slope > 0 else sizes[-1]
    return sum(size <= reach for size in sizes) - 1
