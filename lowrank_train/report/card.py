"""The result card: what a run achieved, for the eye, from result.json alone."""

from __future__ import annotations

from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lowrank_train.report.console import Console
from lowrank_train.report.glue_rows import glue_rows, is_glue
from lowrank_train.report.units import format_bytes, format_duration


def show_card(console: Console, result: dict[str, Any]) -> None:
    """Framed on a terminal, plain lines elsewhere."""
    rows = card_rows(result)
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(value))
    title = f"{result['model']} · {result['strategy']} · {result['data']}"
    width = max(len(label) for label, _ in rows)
    plain = [f"--- {title} ---"] + [indented(label, value, width) for label, value in rows]
    console.show(Panel(table, title=title, expand=False), "\n".join(plain))


def indented(label: str, value: str, width: int) -> str:
    """One row of the plain card; further lines of a value stand below its first."""
    return f"{label:<{width}}  " + value.replace("\n", "\n" + " " * (width + 2))


def card_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each line of the card."""
    state = result["state_bytes"]
    kinds = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in state.items())
    rows = [
        *(glue_rows(result) if is_glue(result) else perplexity_rows(result)),
        (
            "trained",
            f"{result['steps']:,} steps, {result['tokens']:,} tokens, {format_duration(result['seconds'])}",
        ),
        (
            "speed",
            f"{result['tokens_per_sec']:,.0f} tokens/s" + padding_remark(result) + refresh_remark(result),
        ),
        (
            "peak memory",
            f"{format_bytes(result['peak_memory_bytes'])}  "
            + ("(on the GPU)" if result["hardware"]["kind"] == "cuda" else "(of the process, libraries included)"),
        ),
        ("weights", format_bytes(result["weights_bytes"])),
        ("optimizer state", f"{format_bytes(sum(state.values()))}  ({kinds})"),
        ("on", f"{result['hardware']['device']} x {result['hardware']['devices']}"),
    ]
    if result["skipped_tensors"]:
        rows.append(("left out", f"{result['skipped_tensors']} updates of a tensor whose gradient was not finite"))
    if not is_glue(result):
        rows.append(("sample", result["sample"]))
    rows += [("run folder", result["run_folder"]), ("loss curve", result["loss_curve"])]
    if "card" in result:
        rows.append(("this card", result["card"]))
    return rows


def perplexity_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How well a run predicts text."""
    learnt = 1 - result["val_perplexity"] / result["unigram_perplexity"]
    verdict = f"{learnt:.0%} lower is learnt" if learnt > 0 else "nothing is learnt yet"
    return [
        (
            "validation perplexity",
            f"{result['val_perplexity']:.2f}  (loss {result['val_loss']:.4f}, {result['val_tokens']:,} tokens)",
        ),
        (
            "unigram perplexity",
            f"{result['unigram_perplexity']:.2f}  (guessing by frequency alone; {verdict})",
        ),
        (
            "papers' formula",
            f"{result['papers_val_perplexity']:.2f}  (batch means over n + 1 batches; only to compare with GaLore's "
            "family)",
        ),
    ]


def padding_remark(result: dict[str, Any]) -> str:
    """The speed with padding counted, where there is padding."""
    if result["positions_per_sec"] <= 1.001 * result["tokens_per_sec"]:
        return ""
    return f" ({result['positions_per_sec']:,.0f} positions/s with padding)"


def refresh_remark(result: dict[str, Any]) -> str:
    """Time spent on subspaces, where there are any."""
    if not result["refreshes"]:
        return ""
    return f", {result['refresh_sec']:.1f} s of it for {result['refreshes']} subspace refreshes"
