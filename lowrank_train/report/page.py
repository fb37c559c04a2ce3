"""card.html: the result card of a run as one page that needs nothing beside it, made from the run folder alone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.report.card import card_rows
from lowrank_train.report.glue_rows import glue_rows, is_glue, metrics_sentence
from lowrank_train.report.published_tables import rows_of_an_update
from lowrank_train.report.runs import CONFIG_FILE, METRICS_FILE, RESULT_FILE, BrokenRun, RunRecord, read_run, shown
from lowrank_train.report.units import format_bytes, format_count, format_duration

CARD_FILE, PICTURE_FILE = "card.html", "loss.png"
MOST_EVALUATIONS = 25  # rows of the table of evaluations; of more, evenly spread ones are shown
MAIN_KEYS = (
    "seed", "data.name", "data.seq_len", "data.packing", "precision.name", "optim.lr", "optim.schedule",
    "optim.warmup_steps", "optim.grad_clip", "optim.weight_decay", "strategy.when", "strategy.subspace.rank",
    "strategy.subspace.every", "strategy.weights.rank", "trainer.steps", "trainer.batch_size",
)  # fmt: skip
Rows = Iterable[tuple[str, str]]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2329;
  background: #fff }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem }
p.under { color: #59636e; margin: .2rem 0 1.2rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .7rem; margin: 0 0 1.2rem }
.figures div { border: 1px solid #d5dbe1; border-radius: .5rem; padding: .6rem .8rem }
.figures b { display: block; font-size: 1.35rem } .figures span { color: #59636e; font-size: .85rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .22rem .8rem .22rem 0;
  border-bottom: 1px solid #e8ecef; vertical-align: top } th { font-weight: 600; width: 15rem }
table.numbers td, table.numbers th { text-align: right; width: auto } code, pre { font-size: .85rem }
pre { background: #f4f6f8; padding: .8rem; border-radius: .5rem; overflow-x: auto; white-space: pre-wrap }
img { max-width: 100%; height: auto } .columns { display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)) }
""".strip()


def card(config: RunConfig) -> int:
    """Make card.html and loss.png anew in the folders of finished runs; UserError for those that cannot be."""
    folders = [*config.runs, *([config.run] if config.run else [])]
    if not folders:
        raise UserError("runs: name a run folder, as in `lowrank card runs/NAME`")
    faults = []
    for name in folders:
        try:
            print(write_page(Path(name)))
        except BrokenRun as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise UserError(faults)
    return 0


def write_page(folder: Path) -> Path:
    """Draw the picture, write the page beside it, and give its path; raises BrokenRun."""
    from lowrank_train.report.plots import plot_loss

    run = read_run(folder)
    if run.result is None:
        raise BrokenRun(f"is not finished: it has no {RESULT_FILE}")
    plot_loss(
        folder / METRICS_FILE,
        folder / PICTURE_FILE,
        title=title(run.result),
        unigram_perplexity=run.result.get("unigram_perplexity"),
        of_rows=is_glue(run.result),
    )
    picture, config_text = (folder / PICTURE_FILE).read_bytes(), (folder / CONFIG_FILE).read_text(encoding="utf-8")
    try:
        text = page(run, run.result, picture, config_text)
    except KeyError as error:
        raise BrokenRun(f"{RESULT_FILE} lacks {error.args[0]}") from None
    aside = folder / (CARD_FILE + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / CARD_FILE)
    return folder / CARD_FILE


def title(result: dict[str, Any]) -> str:
    """What was trained, how, on what."""
    return f"{result['model']} · {result['strategy']} · {result['data']}"


def page(run: RunRecord, result: dict[str, Any], picture: bytes, config_text: str) -> str:
    """The HTML, from nothing but what its arguments hold: no clock, no machine, no path."""
    name = escape(title(result))
    encoded = base64.b64encode(picture).decode("ascii")
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{name}</h1>",
        f'<p class="under">{escape(str(run.settings.get("run_name") or ""))}</p>',
        '<div class="figures">',
        *(f"<div><span>{escape(label)}</span><b>{escape(value)}</b></div>" for label, value in figures(run, result)),
        "</div>",
        f'<img alt="Loss over the updates" src="data:image/png;base64,{encoded}">',
        '<div class="columns">',
        *section("Result", result_rows(run, result)),
        *section("Memory", memory_rows(run, result)),
        "</div>",
        *evaluations(run),
        *section("Events", event_rows(run)),
        *section("Where it comes from", provenance(result)),
        *section("Configuration", main_keys(run)),
        f'<details><summary>Every key, as in <a href="{CONFIG_FILE}">{CONFIG_FILE}</a></summary>',
        f"<pre>{escape(config_text)}</pre></details>",
        *([] if is_glue(result) else [f"<h2>Sample</h2><pre>{escape(str(result['sample']))}</pre>"]),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def section(heading: str, rows: Rows) -> Iterator[str]:
    """A heading and a table of labels and values; nothing for no rows."""
    lines = [f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in rows]
    if lines:
        yield from (f"<section><h2>{escape(heading)}</h2><table>", *lines, "</table></section>")


def figures(run: RunRecord, result: dict[str, Any]) -> Rows:
    """The numbers one looks for first."""
    if is_glue(result):
        yield "last evaluation", metrics_sentence(result["metrics"])
        yield "best evaluation", metrics_sentence(result["best_metrics"])
    else:
        yield "validation perplexity", f"{result['val_perplexity']:.2f}"
        yield "by the papers' formula", f"{result['papers_val_perplexity']:.2f}"
    yield "peak memory, measured", format_bytes(result["peak_memory_bytes"])
    if run.planned_peak_bytes is not None:
        yield "peak memory of tensors, planned", format_bytes(run.planned_peak_bytes)
    yield "tokens/s", f"{result['tokens_per_sec']:,.0f}"
    yield "time", format_duration(result["seconds"])


def result_rows(run: RunRecord, result: dict[str, Any]) -> Rows:
    """What the card on the terminal says, and the share of refreshes and MFU."""
    if is_glue(result):
        yield from glue_rows(result)
    wanted = ("validation perplexity", "unigram perplexity", "papers' formula", "trained", "speed", "left out")
    yield from ((label, value) for label, value in card_rows(result) if label in wanted)
    mfu = run.median("throughput/mfu")
    yield "MFU", "not known: no peak is known of this device" if mfu is None else f"{mfu:.1%}, median of the updates"
    if result["refreshes"]:
        share = result["refresh_sec"] / result["seconds"] if result["seconds"] else 0.0
        yield (
            "time in refreshes",
            f"{result['refresh_sec']:.1f} s, {share:.1%} of the run, {result['refreshes']:,} bases",
        )
    else:
        yield "time in refreshes", "none: no basis moves"


def memory_rows(run: RunRecord, result: dict[str, Any]) -> Rows:
    """Measured, planned, and counted kind by kind."""
    on_gpu = result["hardware"]["kind"] != "cpu"
    whose = "what the tensors took on the GPU" if on_gpu else "the whole process, its libraries included"
    yield "measured peak", f"{format_bytes(result['peak_memory_bytes'])}, {whose}"
    planned = result.get("planned")
    if planned:
        at_least = "" if planned["complete"] else " at least: a phase could not be followed"
        yield "planned peak", f"{format_bytes(planned['peak_bytes'])} of tensors, in {planned['peak_phase']}{at_least}"
        yield "planned between updates", f"{format_bytes(planned['persistent_bytes'])}, weights and state"
    else:
        yield "planned peak", "not planned"
    yield "weights, counted", format_bytes(result["weights_bytes"])
    for kind, count in result["state_bytes"].items():
        yield f"state, {kind}", format_bytes(count)
    yield "parameters", f"{format_count(result['parameters'])}, {format_count(result['trainable_parameters'])} trained"


def evaluations(run: RunRecord) -> Iterator[str]:
    """The validation curve in numbers; the first and the last are always there."""
    measured = [(point, point.val_loss) for point in run.points if point.val_loss is not None]
    if not measured:
        return
    every = (len(measured) - 1) // MOST_EVALUATIONS + 1
    kept = [pair for index, pair in enumerate(measured) if index % every == 0 or index == len(measured) - 1]
    yield '<h2>Evaluations</h2><table class="numbers">'
    yield "<tr><th>update</th><th>tokens</th><th>time</th><th>training loss</th><th>validation loss</th></tr>"
    for point, loss in kept:
        yield (
            f"<tr><td>{point.step:,}</td><td>{point.tokens:,}</td><td>{format_duration(point.seconds)}</td>"
            f"<td>{point.loss:.4f}</td><td>{loss:.4f}</td></tr>"
        )
    yield "</table>"


def event_rows(run: RunRecord) -> Rows:
    """What happened between updates, by kind."""
    happened: dict[str, list[str]] = {}
    for row in run.rows:
        for kind in filter(None, (row.get("events") or "").split("; ")):
            happened.setdefault(kind.partition(" x")[0], []).append(row["step"])  # however many times
    for kind, steps in happened.items():
        after = f"after update {steps[0]}" if len(steps) == 1 else f"after updates {steps[0]} to {steps[-1]}"
        yield kind, f"{len(steps)} x, {after}"


def provenance(result: dict[str, Any]) -> Rows:
    """What another needs to repeat the run."""
    changed = ", with changes that were not committed" if result["uncommitted_changes"] else ""
    yield "commit", (result["commit"] or "not known: no checkout") + changed
    yield "data, sha256", result["data_fingerprint"]
    yield "tokenizer, sha256", result["tokenizer_fingerprint"]
    hardware = result["hardware"]
    yield (
        "hardware",
        (
            f"{hardware['device']} x {hardware['devices']}; {hardware['cpu_count']} CPU cores, {hardware['threads']} "
            f"threads; {hardware['system']}"
        ),
    )
    yield "versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield "sessions", f"{result['sessions']}" + (" (stopped and resumed)" if result["sessions"] > 1 else "")


def main_keys(run: RunRecord) -> Rows:
    """The keys one asks for first, where they are set."""
    yield from ((key, shown(run.settings[key])) for key in MAIN_KEYS if run.settings.get(key) is not None)
    yield "rows an update", f"{rows_of_an_update(run.settings):,}"
