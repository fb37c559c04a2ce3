"""A plan for people: bytes by kind, phases, and the cards it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowrank_train.memory.cards import GB
from lowrank_train.memory.wire import sent_bytes
from lowrank_train.report.units import format_count, format_duration

if TYPE_CHECKING:
    from lowrank_train.memory.plan import Plan, Verdict

PASSING = ("gradients", "activations", "logits_and_loss")


def table(plan: Plan, utilization: float) -> Iterator[str]:
    """The lines; GB are 10^9 bytes."""
    yield (
        f"{plan.model} ({plan.layers} layers, {plan.vocab_size:,} pieces), strategy {plan.strategy}, precision "
        f"{plan.precision}; micro-batches of {plan.rows} x {plan.seq_len} tokens, {plan.micro_batches} an update, "
        f"{plan.devices} device{'s' * (plan.devices > 1)}" + (f", {plan.together}" if plan.together else "")
    )
    unit, power = ("GB", 9) if plan.peak_bytes >= GB else ("MB", 6)
    yield f"per device, in {unit} of 10^{power} bytes"

    def row(label: str, count: int) -> str:
        return f"  {label:<44}{count / 10**power:>10.3f}"

    yield ""
    yield "kept between updates, counted:"
    for kind, count in plan.bytes.items():
        if count and kind not in PASSING:
            yield row(words(kind), count)
    yield row("together", plan.persistent_bytes)
    yield ""
    yield "of an update, at its most:"
    for kind in PASSING:
        yield row(words(kind), plan.bytes[kind])
    yield ""
    yield "peak of each phase, by running it on tensors without numbers:"
    for phase, count in plan.phases.items():
        yield row(phase, count) + ("  <- peak" if phase == plan.peak_phase else "")
    yield ""
    yield f"needed: {gb(plan.needed_bytes)} = peak {gb(plan.peak_bytes)}" + "".join(
        f" + {name} {gb(count)}" for name, count in plan.allowances.items()
    )
    if plan.messages:
        yield ""
        yield from traffic(plan, unit, power)
    yield ""
    for verdict in plan.verdicts:
        yield sentence(verdict)
    yield ""
    yield (
        f"{plan.flops_per_position:.3g} FLOP a token, {plan.compute_per_position:.3g} with recomputation; "
        f"{format_count(plan.positions)} tokens in all. Speeds assume {utilization:.0%} of the card's dense bf16 peak, "
        "refreshes of bases not counted: an assumption, not a measurement."
    )
    for remark in plan.remarks:
        yield f"remark: {remark}"


def traffic(plan: Plan, unit: str, power: int) -> Iterator[str]:
    """What one device sends in an update, kind by kind: payload, how often, and the bytes on the wire."""
    yield f"sent by a device in an update, in {unit}, by the formulas of rings: payload, times an update, on the wire:"
    for message in plan.messages:
        label = f"{message.what}, {message.collective.replace('_', '-')}"
        sent = message.sent_bytes(plan.devices) / 10**power
        yield f"  {label:<62}{message.payload_bytes / 10**power:>10.3f}{message.times:>9.4g}{sent:>10.3f}"
    yield f"  {'together':<62}{'':>19}{sent_bytes(plan.messages, plan.devices) / 10**power:>10.3f}"


def sentence(verdict: Verdict) -> str:
    """`4090: fits, 1.23 GB to spare`."""
    if verdict.fits is None:
        said = "not known: a phase could not be followed, see the remarks"
    elif verdict.fits:
        said = f"fits, {gb(verdict.margin_bytes)} to spare"
    else:
        said = f"does not fit, {gb(-verdict.margin_bytes)} too much"
    line = f"{verdict.card}: {gb(verdict.usable_bytes)} usable, {said}"
    if verdict.tokens_per_sec is not None and verdict.days is not None:
        line += f"; {verdict.tokens_per_sec:,.0f} tokens/s, {format_duration(verdict.days * 86_400)}"
    return line


def words(kind: str) -> str:
    """A key of the JSON as one reads it."""
    return kind.replace(".", ": ", 1) if kind.startswith("state.") else kind.replace("_", " ")


def gb(count: int) -> str:
    """Bytes in GB of 10^9."""
    return f"{count / GB:.2f} GB"
