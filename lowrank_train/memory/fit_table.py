"""`lowrank plan fit=true`: what was tried, what each change saves and costs, and the command line that fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.cards import Card, chosen_card
from lowrank_train.memory.fitting import Fit, Search, Tried, written
from lowrank_train.memory.plan import Plan
from lowrank_train.memory.plan_table import gb

OF_THE_PLAN = ("task", "fit", "card", "budget_gb", "format")
"""Keys that say nothing of the run."""


def fit(config: RunConfig, given: Sequence[str]) -> int:
    """Print what fits the card, the words given being those of the command line; 0 also where nothing does."""
    card = chosen_card(config.card, config.budget_gb)
    assert card is not None
    show_progress = sys.stderr.isatty()

    def said(words: str) -> None:
        if show_progress:
            print(f"\r\x1b[Kplanning {words}", end="", file=sys.stderr, flush=True)

    found = Search(config, card, said).fit()
    if show_progress:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if config.format == "json":
        print(json.dumps(as_json(found, card, given), indent=2))
    else:
        print("\n".join(lines(found, card, given)))
    return 0


def as_json(found: Fit, card: Card, given: Sequence[str]) -> dict[str, Any]:
    """Everything that was found, and the plan with the words that fit or come nearest."""
    assert found.plan is not None
    return {
        "card": card.name,
        "usable_bytes": card.usable_bytes,
        "fits": found.fits,
        "words": [f"{key}={value}" for key, value in found.words.items()],
        "command": command(found, given),
        "as_it_is": {"needed_bytes": found.as_it_is.needed_bytes, "fits": found.as_it_is.verdicts[0].fits},
        "tried": [asdict(tried) | {"words": written(tried.words)} for tried in found.tried],
        "refused": found.refused,
        "largest_update_rows": None if found.larger is None else found.larger.rows,
        "plan": found.plan.as_json(),
    }


def lines(found: Fit, card: Card, given: Sequence[str]) -> Iterator[str]:
    """GB are 10^9 bytes; what is saved is the difference of two plans."""
    now, plan = found.as_it_is, found.plan
    assert plan is not None
    yield f"{card.name}: {gb(card.usable_bytes)} usable"
    yield f"as it is: {need(now, card)}; micro-batches of {now.rows} rows, {now.micro_batches} an update"
    if found.tried:
        yield ""
        yield "tried, the cheapest first, each beside what was kept before it:"
        for tried in found.tried:
            yield from tried_lines(tried, tried_was_kept(tried, found))
    reasons: dict[str, str] = {}
    for words, reason in found.refused.items():
        reasons.setdefault(reason.partition(": ")[2] or reason, words)
    for reason, words in reasons.items():
        yield f"  refused: {words}: {reason}"
    yield ""
    if not found.fits:
        yield f"nothing known here fits. Nearest: {written(found.words) or 'the run as it is'}: {need(plan, card)}"
        yield "another strategy or a smaller model may: lowrank plan strategy=all ..."
        return
    yield f"largest micro-batch: {plan.rows} rows, {plan.micro_batches} an update: {need(plan, card)}"
    if found.larger is not None and found.larger.rows > plan.rows:
        rows, all_rows = found.larger.rows, found.larger.rows * found.larger.devices
        yield (
            f"room for micro-batches of up to {rows} rows, {need(found.larger, card)}: trainer.batch_size={rows} "
            f"trainer.total_batch_size={all_rows}, which is another run, for an update then has {all_rows} rows"
        )
    yield f"the command that fits: {command(found, given)}"


def tried_lines(tried: Tried, kept: bool) -> Iterator[str]:
    """One change: whether it was kept, what it saves, what is needed then, and its price."""
    saved = f"{gb(tried.saved_bytes)} less" if tried.saved_bytes >= 0 else f"{gb(-tried.saved_bytes)} more"
    yield f"  {'+' if kept else ' '} {written(tried.words)}: {saved}, {gb(tried.needed_bytes)} needed"
    yield f"      {tried.price}"


def tried_was_kept(tried: Tried, found: Fit) -> bool:
    """All its words are among those that remain."""
    return tried.words.items() <= found.words.items()


def need(plan: Plan, card: Card) -> str:
    """`needs 21.30 GB, fits, 3.95 GB to spare`."""
    spare = card.usable_bytes - plan.needed_bytes
    if plan.verdicts[0].fits is None:
        return f"needs at least {gb(plan.needed_bytes)}, not known whether it fits: {'; '.join(plan.remarks)}"
    return f"needs {gb(plan.needed_bytes)}, " + (
        f"fits, {gb(spare)} to spare" if spare >= 0 else f"{gb(-spare)} too much"
    )


def command(found: Fit, given: Sequence[str]) -> str | None:
    """The command line of the run; None where nothing fits."""
    if not found.fits:
        return None
    replaced = (*OF_THE_PLAN, *found.words)
    stay = [word for word in given if word.lstrip("+").partition("=")[0] not in replaced]
    return " ".join(["lowrank train", *stay, written(found.words)]).strip()
