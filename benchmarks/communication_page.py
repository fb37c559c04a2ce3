"""What the devices of a run send each other, as `lowrank plan` counts it, into docs/communication.md.

.venv/bin/python -m benchmarks.communication_page
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lowrank_train.config import compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.cards import GB
from lowrank_train.memory.plan import counted
from lowrank_train.memory.shares import Shares
from lowrank_train.memory.traffic import messages_of
from lowrank_train.memory.wire import Message, sent_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "communication.md"
PIECES = 32_000  # of T5-base's tokenizer
CARDS = (8, 64, 1024)
PER_NODE = 8
MODEL = ("recipe=null", "task=plan", "model=llama_7b", "precision=bf16")
GALORE = ("strategy=galore", "strategy.subspace.rank=1024", "strategy.subspace.every=200")
WAYS = {
    "DDP, `strategy=full`": ("strategy=full", "trainer=ddp"),
    "DDP, `strategy=galore`": (*GALORE, "trainer=ddp"),
    "projected DDP, `strategy=galore`": (*GALORE, "trainer=ddp", "trainer.reduce=projected"),
    "FSDP2, `strategy=full`": ("strategy=full", "trainer=fsdp"),
    "FSDP2, `strategy=galore`": (*GALORE, "trainer=fsdp"),
}
HEAD = """# What devices send each other

Written by `python -m benchmarks.communication_page` (`make docs`) from what `lowrank plan` counts; nothing here was
measured. `lowrank plan trainer=fsdp trainer.devices=8 ...` prints the same for any run, message by message.

## Formulas

A ring of n ranks sends, from each rank, for a payload of S bytes (the factors of the bus bandwidth in nccl-tests,
doc/PERFORMANCE.md):

| operation | sent | the payload is |
|---|---|---|
| all-reduce | 2 (n - 1) / n S | the tensor |
| reduce-scatter | (n - 1) / n S | the whole tensor that each rank hands over |
| all-gather | (n - 1) / n S | the whole tensor that each rank ends with |
| broadcast | S | the tensor |
| all-to-all | (n - 1) / n S | what one rank hands over for all, in the mean |

What is sent in an update of k micro-batches, with W bytes of weights, G of trained gradients, of these G_p of the
matrices in a subspace and g_p of their projections, B of their bases, and a basis that moves every T updates:

* **DDP**: all-reduce of G once an update, whatever k. With a subspace, 1/T times a broadcast of B: one rank moves a
  basis for all.
* **Projected DDP** (`trainer.reduce=projected`): all-reduce of G - G_p + (1 - 1/T) g_p + G_p / T, since compressing
  is linear, mean(P^T G_i) = P^T mean(G_i); a basis that is due moves by the whole gradient. A lift that uses the
  whole gradient (Fira, APOLLO, FRUGAL) or error feedback (LDAdam) needs it in every update, so that nothing is saved.
  The broadcast as above.
* **FSDP2**: k times an all-gather of W for the forward passes, of the layers' share of W again for the backward
  passes, and a reduce-scatter of G. Rows are padded to a multiple of n. Matrices whose rule treats rows apart (the
  columns compressed) are served where they lie: 1/T times their gradient goes to one rank, and its basis to all.
  Every other matrix has an owner: in each update an all-to-all of gradient, of weights, and of new weights back.
* **ZeRO**: stage 1 a reduce-scatter of G and an all-gather of the trained weights once an update; stage 2 the
  reduce-scatter k times; stage 3 as FSDP2, k times two all-gathers and the reduce-scatter (arXiv 1910.02054, section
  7), but for parameters of at most 100,000 numbers, which are gathered once an update and then stay whole.

Left out: flags, norms and sums (a few bytes a parameter), the first distribution of weights, evaluations,
checkpoints, and DeepSpeed's padding. NCCL takes trees for small messages and switches that add up on the way where
there are any; both send no more than this.
"""


def configured(way: str, cards: int, micro_batches: int = 1) -> RunConfig:
    """The 7B model in bfloat16 on so many cards, eight to a node."""
    devices = ("trainer.devices=8", f"trainer.num_nodes={cards // PER_NODE}", "trainer.batch_size=1")
    return compose([*MODEL, *WAYS[way], *devices, f"trainer.total_batch_size={cards * micro_batches}"])


def counts(way: str, cards: int, micro_batches: int = 1) -> tuple[list[Message], int]:
    """What is sent, and what a card keeps between two updates, gradients left out."""
    config = configured(way, cards, micro_batches)
    model, optimizer = counted(config, PIECES)
    return messages_of(config, model, optimizer), sum(Shares.of(config).kept(config, model, optimizer).values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """In Markdown."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def sent(way: str, cards: int, micro_batches: int = 1) -> str:
    """GB that a card sends in an update."""
    return f"{sent_bytes(counts(way, cards, micro_batches)[0], cards) / GB:.2f}"


def lines() -> Iterator[str]:
    """The page."""
    yield HEAD
    yield "## LLaMA 7B in bfloat16, rank 1024, bases that move every 200 updates\n"
    yield "GB (10^9 bytes) that one card sends in an update of one micro-batch:\n"
    cards = [f"{count:,} cards" for count in CARDS]
    yield from table(["", *cards], ([way, *(sent(way, count) for count in CARDS)] for way in WAYS))
    yield "The same with 8 micro-batches in an update:\n"
    yield from table(["", *cards], ([way, *(sent(way, count, 8) for count in CARDS)] for way in WAYS))
    yield "GB that the fullest card keeps between updates: weights, state and bases, without gradients:\n"
    kept = ([way, *(f"{counts(way, count)[1] / GB:.2f}" for count in CARDS)] for way in WAYS)
    yield from table(["", *cards], kept)
    yield "Message by message on 64 cards, one micro-batch:\n"
    for way in WAYS:
        yield f"{way}:\n"
        rows = (
            [one.what, one.collective.replace("_", "-"), f"{one.payload_bytes / GB:.3f}", f"{one.times:.4g}",
             f"{one.sent_bytes(64) / GB:.3f}"]
            for one in counts(way, 64)[0]
        )  # fmt: skip
        yield from table(["", "operation", "payload, GB", "times an update", "sent, GB"], rows)


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()).rstrip() + "\n", encoding="utf-8")
