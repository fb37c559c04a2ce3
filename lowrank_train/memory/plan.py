"""`lowrank plan`: what a run will hold, at every moment and at the most, before a byte of it is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from lowrank_train.config.checks import micro_batches, world_size
from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import tokenizer_of
from lowrank_train.memory.cards import CARDS, Card, allowances, chosen_card
from lowrank_train.memory.counting import flops_per_position
from lowrank_train.memory.extrapolating import DEEPER, SHALLOW, NotAlike, extrapolated
from lowrank_train.memory.fake_run import MOVING, PLAIN, fake_run, optimizer_for, prepared
from lowrank_train.memory.plan_table import table
from lowrank_train.memory.shares import Shares, for_a_while
from lowrank_train.memory.traffic import messages_of
from lowrank_train.memory.watch import Watched
from lowrank_train.memory.wire import Message, sent_bytes
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.ranks import BUCKET_BYTES

PAPERS_VOCABULARY = 32_000  # pieces of T5-base's tokenizer, which the C4 runs of the GaLore family use
ASSUMED_UTILIZATION = 0.4
"""Share of a card's peak that a run of a well-fed LLaMA reaches, an assumption and no measurement: PaLM (arXiv
2204.02311, table 3) reports 0.21 to 0.46 of large runs. Small models and small batches reach less."""


@dataclass(frozen=True)
class Verdict:
    """Whether a run goes on a card."""

    card: str
    usable_bytes: int
    needed_bytes: int
    fits: bool | None  # None: not known, since a phase could not be followed
    tokens_per_sec: float | None  # of all devices, at ASSUMED_UTILIZATION
    days: float | None

    @property
    def margin_bytes(self) -> int:
        return self.usable_bytes - self.needed_bytes


@dataclass(frozen=True)
class Plan:
    """What one device of the run holds, the fullest where they differ."""

    model: str
    strategy: str
    precision: str
    layers: int
    vocab_size: int
    devices: int
    together: str  # how devices work together: trainer.strategy, and trainer.reduce where it is projected
    micro_batches: int
    rows: int  # of a micro-batch
    seq_len: int
    positions: int  # of the whole run
    persistent_bytes: int  # between two updates, without gradients: weights, buffers, state
    bytes: dict[str, int]
    phases: dict[str, int]  # the most that is alive in each
    peak_bytes: int
    peak_phase: str
    complete: bool  # every phase could be followed; else the peak is a lower bound
    allowances: dict[str, int]
    flops_per_position: float  # without recomputation
    compute_per_position: float  # with it
    verdicts: list[Verdict]  # of the card asked for, or of all
    asked: bool  # for one card or a budget
    messages: list[Message]  # what the devices send each other
    remarks: list[str] = field(default_factory=list)

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + sum(self.allowances.values())

    def as_json(self) -> dict[str, Any]:
        """Keys and numbers alone."""
        found = asdict(self)
        found.pop("asked")
        one = self.verdicts[0] if self.asked else None
        found["verdicts"] = [asdict(item) | {"margin_bytes": item.margin_bytes} for item in self.verdicts]
        found["messages"] = [vars(one) | {"sent_bytes": one.sent_bytes(self.devices)} for one in self.messages]
        return found | {
            "sent_bytes_per_update": sent_bytes(self.messages, self.devices),
            "needed_bytes": self.needed_bytes,
            "card": None if one is None else one.card,
            "fits": None if one is None else one.fits,
            "margin_bytes": None if one is None else one.margin_bytes,
            "assumed_utilization": ASSUMED_UTILIZATION,
        }


def plan(config: RunConfig) -> int:
    """Print the plan of a run as a table or as JSON; UserError for what cannot be."""
    card = chosen_card(config.card, config.budget_gb)
    found = planned(config, card)
    if config.format == "json":
        print(json.dumps(found.as_json(), indent=2))
    else:
        print("\n".join(table(found, ASSUMED_UTILIZATION)))
    return 0


def planned(config: RunConfig, card: Card | None = None) -> Plan:
    """Count what is kept, and follow a run through all its phases with fake tensors."""
    remarks: list[str] = []
    vocab_size = vocabulary(config, remarks)
    model, optimizer = counted(config, vocab_size)
    kept = Shares.of(config).kept(config, model, optimizer)
    watched, complete = followed(config, vocab_size, model, remarks)
    remarks += cautions(config)
    devices = world_size(config)
    phases = {phase: most + for_a_while(config, model, optimizer, phase) for phase, most in highest(watched).items()}
    settings, peak = config.trainer, max(phases.values())
    flops = flops_per_position(model, config.data.seq_len)
    compute = flops * (4 / 3 if config.model.activation_checkpointing else 1)  # one more forward pass beside the three
    extra = allowances(peak, bucket_bytes(config, kept["trained_weights"]))
    positions = settings.steps * micro_batches(config) * settings.batch_size * devices * config.data.seq_len
    verdicts = [
        judged(item, peak + sum(extra.values()), complete, compute, positions, devices, config)
        for item in ([card] if card is not None else CARDS)
    ]
    return Plan(
        model=config.model.name,
        strategy=config.strategy.name,
        precision=config.precision.name,
        layers=model.config.get_text_config().num_hidden_layers,
        vocab_size=model.config.get_text_config().vocab_size,
        devices=devices,
        together=together(config),
        micro_batches=micro_batches(config),
        rows=settings.batch_size,
        seq_len=config.data.seq_len,
        positions=positions,
        persistent_bytes=sum(kept.values()),
        bytes=kept | passing(watched, head_name(model)),
        phases=phases,
        peak_bytes=peak,
        peak_phase=max(phases, key=phases.__getitem__),
        complete=complete,
        allowances=extra,
        flops_per_position=flops,
        compute_per_position=compute,
        verdicts=verdicts,
        asked=card is not None,
        messages=messages_of(config, model, optimizer),
        remarks=remarks,
    )


def counted(config: RunConfig, vocab_size: int) -> tuple[PreTrainedModel, TransformOptimizer]:
    """The model and its optimizer with all its state, on meta."""
    model, strategy = prepared(config, vocab_size)
    optimizer = optimizer_for(config, strategy, model)
    optimizer.initialize()
    return model, optimizer


def kept_bytes(config: RunConfig, vocab_size: int) -> dict[str, int]:
    """By kind what stays between two updates on one device: weights, buffers, state."""
    return Shares.of(config).kept(config, *counted(config, vocab_size))


def bucket_bytes(config: RunConfig, trained_bytes: int) -> int:
    """What lies beside the gradients to be sent: DistributedDataParallel copies every one into a bucket that lives as
    long as the run; projected ones travel in buckets of 25 MiB, one at a time; parts are sent from where they are."""
    if world_size(config) == 1 or config.trainer.strategy not in ("auto", "ddp"):
        return 0
    return BUCKET_BYTES if config.trainer.reduce == "projected" else trained_bytes


def together(config: RunConfig) -> str:
    """`ddp`, `ddp (reduce=projected)`, `fsdp`, ...; "" for a device alone."""
    if world_size(config) == 1:
        return ""
    name = "ddp" if config.trainer.strategy == "auto" else config.trainer.strategy
    return f"{name} (reduce=projected)" if config.trainer.reduce == "projected" else name


def vocabulary(config: RunConfig, remarks: list[str]) -> int:
    """Pieces of the tokenizer; the papers' where it is a name on the hub that is not at hand."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    try:
        return tokenizer_of(config).vocab_size
    except UserError:
        if config.model.kind == "hf":
            remarks.append(f"tokenizer {config.data.tokenizer} is not at hand, and taken to fit the model")
            return 1
        remarks.append(
            f"tokenizer {config.data.tokenizer} is not at hand; planned with {PAPERS_VOCABULARY:,} pieces, the papers' "
            "T5-base. model.vocab_size says otherwise"
        )
        return PAPERS_VOCABULARY


def followed(config: RunConfig, vocab_size: int, model: PreTrainedModel, remarks: list[str]) -> tuple[Watched, bool]:
    """The run on fake tensors, from two shallow ones where it follows from them, and whether no phase is missing."""
    layers = model.config.get_text_config().num_hidden_layers
    runs = []
    if config.model.kind == "llama" and config.strategy.blocks is None and layers > DEEPER:
        runs = [fake_run(config, vocab_size, SHALLOW), fake_run(config, vocab_size, DEEPER)]
        try:
            watched = extrapolated(runs[0], runs[1], layers)
        except NotAlike:
            runs = []
    if not runs:
        runs = [fake_run(config, vocab_size)]
        watched = runs[0].watched
    remarks += dict.fromkeys(remark for run in runs for remark in run.remarks)
    return watched, all(run.complete for run in runs)


def highest(watched: Watched) -> dict[str, int]:
    """The most bytes alive in each phase, in the order of the phases."""
    phases: dict[str, int] = {}
    for segment, extent in watched.segments.items():
        phases[segment.phase] = max(phases.get(segment.phase, 0), extent.peak)
    phases.pop("", None)  # before the first
    return phases


def passing(watched: Watched, head: str) -> dict[str, int]:
    """What comes and goes in an ordinary update: activations and gradients at their most, the loss's workspace."""
    moments, updates = watched.moments, (f"{PLAIN}: ", f"{MOVING}: ")

    def most(what: str) -> int:
        return max((n for name, n in moments.items() if name.startswith(tuple(u + what for u in updates))), default=0)

    loss = [
        extent.peak - extent.start
        for segment, extent in watched.segments.items()
        if segment.phase.startswith(f"{PLAIN}: forward") and segment.tensor == head
    ]
    return {"gradients": most("gradients"), "activations": most("activations"), "logits_and_loss": max(loss, default=0)}


def head_name(model: PreTrainedModel) -> str:
    """The parameter that makes logits of hidden states; "" where there is no such one."""
    head = model.get_output_embeddings()
    names = {id(param): name for name, param in model.named_parameters()}
    return "" if head is None else names.get(id(head.weight), "")


def judged(
    card: Card, needed_bytes: int, complete: bool, compute: float, positions: int, devices: int, config: RunConfig
) -> Verdict:
    """Whether it fits, and how long it takes where the card's speed in this precision is known."""
    speed = card.peak_flops if config.precision.compute != "32-true" else None
    per_sec = None if speed is None else ASSUMED_UTILIZATION * speed * devices / compute
    days = None if per_sec is None else positions / per_sec / 86_400
    fits = needed_bytes <= card.usable_bytes
    return Verdict(card.name, card.usable_bytes, needed_bytes, fits if complete or not fits else None, per_sec, days)


def cautions(config: RunConfig) -> list[str]:
    """What the plan leaves out."""
    found = []
    if config.trainer.accelerator != "cpu":
        found.append(
            "temporaries are those of plain torch operations; where Triton's kernels run on a card, it takes less"
        )
    if config.model.compile:
        found.append("model.compile changes which temporaries there are; the plan is of the model as it is written")
    if config.model.attention not in ("sdpa", "eager"):
        found.append(f"model.attention={config.model.attention} has no fake kernel; if it was not run, see above")
    if config.precision.compute == "bf16-mixed" and Shares.of(config).by_rows:
        found.append("autocast's bfloat16 copies of weights are counted, which FSDP2 does not keep")
    if Shares.of(config).masters:
        found.append("DeepSpeed's buckets are left out")
    if config.strategy.blocks is not None:
        found.append("the blocks that train at the beginning are planned with; others may be larger")
    return found
