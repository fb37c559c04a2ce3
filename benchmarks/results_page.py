"""docs/results.md from the rows under benchmarks/results/: what was measured, where and when.

.venv/bin/python -m benchmarks.results_page
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "results.md"
Rows = list[dict[str, Any]]


def rows_of(benchmark: str) -> Iterator[tuple[str, Rows]]:
    """Where and when, and the rows, of each machine that has run a benchmark."""
    for path in sorted(RESULTS.glob(f"{benchmark}-*.json")):
        rows: Rows = json.loads(path.read_text(encoding="utf-8"))
        dates = sorted({row["date"] for row in rows})
        threads = ", ".join(sorted({str(row["threads"]) for row in rows}))
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        yield f"{rows[0]['device']}, {threads} threads, torch {rows[0]['torch']}, {when}", rows


def table(columns: Iterable[str], lines: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table, the first column to the left and the others to the right."""
    columns = list(columns)
    rule = "|---|" + "---:|" * (len(columns) - 1)
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(map(str, line))} |" for line in lines)]


def equal_tokens(rows: Rows) -> list[str]:
    columns = (
        "strategy",
        "perplexity",
        "learning rate",
        "trained",
        "parameters",
        "weights, MiB",
        "state, MiB",
        "tokens/s",
    )
    lines = [
        (
            row["strategy"], f"{row['val_perplexity']:.2f}", f"{row['lr']:g}", f"{row['trainable_parameters']:,}",
            f"{row['parameters']:,}", f"{row['weights_bytes'] / 2**20:.2f}", f"{row['state_bytes'] / 2**20:.2f}",
            f"{row['tokens_per_sec']:,}",
        )
        for row in sorted(rows, key=lambda row: float(row["val_perplexity"]))
    ]  # fmt: skip
    first = rows[0]
    note = (
        f"{first['tokens']:,} tokens in {first['steps']:,} updates, rank {first['rank']}; unigram perplexity "
        f"{first['unigram_perplexity']:.0f}. The two best learning rates of runs of "
        f"{first['tuning_steps']} updates were tried."
    )
    return [note, "", *table(columns, lines)]


def step_time(rows: Rows) -> list[str]:
    columns = (
        "method", "model", "beside", "step / theirs", "step / its matrix products", "refresh / theirs",
        "extra, MiB (theirs)",
    )  # fmt: skip
    lines = []
    for row in rows:
        theirs = row.get("theirs_extra_mib")
        lines.append((
            row["method"], f"{row['model']}, {row['layers']} layers", row.get("rival") or "",
            number(row.get("step_ratio")), number(row.get("over_products")), number(row.get("refresh_ratio")),
            f"{row['ours_extra_mib']}" + ("" if theirs is None else f" ({theirs})"),
        ))  # fmt: skip
    return table(columns, lines)


def number(value: float | None) -> str:
    """Two digits after the point; nothing for what was not measured."""
    return "" if value is None else f"{value:.2f}"


def layer_time(rows: Rows) -> list[str]:
    columns = ("layer", "out x in", "tokens", "time / nn.Linear", "CPU time / nn.Linear", "peak / nn.Linear")
    return table(
        columns,
        [
            (row["layer"], " x ".join(map(str, row["shape"])), f"{row['tokens']:,}",
             f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}", f"{row['peak_ratio']:.2f}")
            for row in rows
            if row["layer"] != "linear"
        ],
    )  # fmt: skip


def end_to_end(rows: Rows) -> list[str]:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        of = {row["conventions"]: row for row in rows if row["run"] == run}
        cells = [
            text
            for kind in ("published", "ours")
            for text in ((f"{of[kind]['our_loss']:.4f}", f"{of[kind]['difference']:+.4f}") if kind in of else ("", ""))
        ]
        nudged = of.get("published", {}).get("nudged_losses")
        spread = f"{min(nudged):.4f} to {max(nudged):.4f}" if nudged else ""
        lines.append((run, f"{next(iter(of.values()))['recorded_loss']:.4f}", *cells[:2], spread, *cells[2:]))
    titles = ("run", "recorded", "published conventions", "difference", "nudged", "our defaults", "difference")
    return table(titles, lines)


def precision_curves(rows: Rows) -> list[str]:
    columns = ("strategy", "format", "loss", "difference", "limit", "weights, MiB", "state, MiB")
    lines = [
        (
            row["strategy"], row["format"], f"{row['val_loss']:.4f}", f"{row['difference']:+.4f}",
            "" if row["limit"] is None else f"{row['limit']:g}",
            f"{row['weights_bytes'] / 2**20:.2f}", f"{row['state_bytes'] / 2**20:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return table(columns, lines)


def storage(rows: Rows) -> list[str]:
    columns = (
        "state",
        "encode",
        "decode",
        "error of one round",
        "step of Adam",
        "error of the steps",
        "bytes a number",
    )
    coded, stepped = ({row["format"]: row for row in rows if row["kind"] == kind} for kind in ("codes", "step"))
    lines = []
    for name, row in stepped.items():
        codes = coded.get(name, {})
        lines.append((
            name, number(codes.get("encode_ratio")), number(codes.get("decode_ratio")),
            f"{codes['error']:.1e}" if codes else "", number(row["step_ratio"]), f"{row['error']:.1e}",
            f"{row['bytes_per_number']:.2f}",
        ))  # fmt: skip
    return table(columns, lines)


def glue_runs(rows: Rows) -> list[str]:
    """A line for each official metric of a task: the last evaluation, in percent, median and span over seeds."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task]
        start = of[0].get("start")
        split = next(iter(of[0]["metrics"]))
        for metric in of[0]["metrics"][split]:
            found = {
                name: [100 * row["metrics"][split][metric] for row in of if row["strategy"] == name]
                for name in strategies
            }
            common = of[0]["commonest_label_metrics"]
            lines.append((
                f"{task} from {start}" if start else task, metric,
                "not defined" if common is None else f"{100 * common[split][metric]:.1f}",
                *map(median_and_span, found.values()),
                f"{of[0]['train_rows'] or 'all'}", of[0]["validation_rows"], of[0]["epochs"],
            ))  # fmt: skip
    kinds = {row["strategy"]: f"{' '.join(row['settings'])}, {row['trainable_parameters']:,} trained, state "
             f"{row['state_bytes'] / 2**20:.1f} MiB" for row in rows}  # fmt: skip
    return [
        *table(("task", "metric", "commonest label", *strategies, "trained rows", "evaluated", "epochs"), lines),
        "",
        "; ".join(f"{name}: {kind}" for name, kind in kinds.items()) + ".",
    ]


def communication(rows: Rows) -> list[str]:
    """Payloads of one rank, in MB; by how much fewer go over the wire."""
    columns = (
        "projected",
        "plain DDP, MB",
        "projected",
        "update that moves all bases",
        "mean of 200",
        "ratio of the mean",
    )
    return table(
        columns,
        (
            (row["selected"], *(row[f"{name}_mb"] for name in ("plain", "projected", "with_moves", "mean")),
             f"{row['mean_over_plain']:.3f}")
            for row in rows
        ),
    )  # fmt: skip


def median_and_span(values: list[float]) -> str:
    if not values:
        return ""
    span = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{statistics.median(values):.1f}{span}"


SECTIONS = (
    (
        "equal_tokens",
        "Equal tokens",
        """Each family on the same tokens of the bundled plays, at its own best learning rate. A model this small says
how the strategies behave here, not how they rank at 60M and above. `python -m benchmarks.equal_tokens`""",
        equal_tokens,
    ),
    (
        "step_time",
        "One optimizer step",
        """Ratios to the published package in the same process: below 1 is faster. *Its matrix products* are those that
the method's algebra cannot do without; what is above them is walks over matrices number by number, which weigh more
where matrices are small: APOLLO multiplies once (APOLLO-Mini with rank 1) but reads the gradient three times, once to
scale it into the weights, and LDAdam orthonormalises a basis at every update. *Refresh* is a step that moves every
basis; *extra* is the memory of a step beyond what is there before it. `python -m benchmarks.step_time`""",
        step_time,
    ),
    (
        "layer_time",
        "One layer, forward and backward",
        """Beside nn.Linear in the same process, rank 128, 3 % sparse; the peak counts Adam's state.
`python -m benchmarks.layer_time`""",
        layer_time,
    ),
    (
        "precision_curves",
        "State and weights in fewer bits",
        """Evaluation loss of the default recipe's model after 500 updates, and how far it is from that of the same
strategy in float32, in nats; *limit* is what the format may cost. `python -m benchmarks.precision_curves`""",
        precision_curves,
    ),
    (
        "storage",
        "State in few bits beside bitsandbytes",
        """CPU time as ratio to that of bitsandbytes' 8-bit optimizer in the same process: encoding and decoding a
matrix of moments, and a whole step of Adam on one float32 matrix. *One round* is encode and decode, *the steps* are 20
updates by gradients whose rows and columns span two decades each, which is harder than training. Bytes are those of
both moments. `python -m benchmarks.storage`""",
        storage,
    ),
    (
        "glue_runs",
        "Fine-tuning on GLUE",
        """The packed encoder all-MiniLM-L6-v2 (22.7M parameters, 6 layers, 384 wide) on part of the training rows, a
few epochs, one learning rate for each strategy on all tasks: what shows is that each strategy learns, not which is
best. RTE, with its few rows, starts from the run on MNLI at full rank, as in LoRA's runs; MNLI itself is evaluated on
1,000 matched rows. The last evaluation on the whole validation split, in percent; *commonest label* is what giving the
same label to every row has (correlations: not defined). Matrix products in bfloat16, all else in float32.
`python -m benchmarks.glue_runs --data FOLDER`""",
        glue_runs,
    ),
    (
        "communication",
        "What DDP sends in an update",
        """Payload of all-reduces and broadcasts of one of two processes, counted by a hook: LLaMA 60M with GaLore at
rank 128, whole gradients beside projected ones (trainer.reduce=projected). GaLore leaves embedding and head whole,
which are 56 % of this model's parameters; its matrices alone send a quarter. `python -m benchmarks.communication`""",
        communication,
    ),
    (
        "end_to_end",
        "Beside recorded runs of published code",
        """Evaluation loss of a LLaMA of 4 layers after 200 updates on WikiText-2. Runs at a learning rate of 1e-2
and APOLLO-Mini, which has rank 1, are chaotic: *nudged* is where the same run ends from initial weights a millionth
away.
relora_asis is the published start with two zero factors; at the recorded learning rate it ends lower than the repaired
one, `relora`, does, there as here. `python -m benchmarks.end_to_end --reference FOLDER`""",
        end_to_end,
    ),
)


def page() -> str:
    """The whole of docs/results.md."""
    lines = ["# Results", "", "Made by `python -m benchmarks.results_page` from the rows in benchmarks/results/."]
    for benchmark, title, note, render in SECTIONS:
        for where, rows in rows_of(benchmark):
            lines += ["", f"## {title}", "", f"{note} On {where}.", "", *render(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print("written to", PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE)


if __name__ == "__main__":
    main()
