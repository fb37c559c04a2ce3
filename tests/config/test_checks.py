"""Every rule that ties keys together: the command line it refuses, and the nearest one that it allows."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from lowrank_train.config import RunConfig, compose
from lowrank_train.config.bounds import LOWER_BOUNDS, UPPER_BOUNDS
from lowrank_train.config.checks import cross_checks, micro_batches
from lowrank_train.config.strategy_checks import smallest_side

Faults = Callable[..., list[str]]

DEFAULT = compose([])
RESTARTS = "optim=cosine_restarts"

REFUSED_AND_ALLOWED: list[tuple[str, str, str]] = [  # words refused; part of the reason; words allowed
    ("trainer.total_batch_size=10", "multiple of the 4 rows", "trainer.total_batch_size=12"),
    ("trainer.total_batch_size=2", "such as 4", "trainer.total_batch_size=4"),
    (
        "trainer.total_batch_size=12 trainer.devices=2",
        "such as 8 or 16",
        "trainer.total_batch_size=16 trainer.devices=2",
    ),
    ("optim.warmup_steps=60 trainer.steps=50", "is above trainer.steps=50", "optim.warmup_steps=50 trainer.steps=50"),
    (f"{RESTARTS} optim.cycle_steps=null", "give a divisor of trainer.steps=1200", RESTARTS),
    (
        f"{RESTARTS} optim.cycle_steps=500",
        "optim.cycle_steps=500: must divide trainer.steps=1200; choose another, or trainer.steps=1000 or 1500",
        f"{RESTARTS} optim.cycle_steps=500 trainer.steps=1500",
    ),
    (f"{RESTARTS} optim.cycle_steps=2000", "or trainer.steps=2000", f"{RESTARTS} optim.cycle_steps=1200"),
    (f"{RESTARTS} optim.warmup_steps=401", "is above optim.cycle_steps=400", f"{RESTARTS} optim.warmup_steps=400"),
    (
        f"{RESTARTS} optim.restart_warmup_steps=401",
        "is above optim.cycle_steps=400, so the next restart",
        f"{RESTARTS} optim.restart_warmup_steps=400",
    ),
    (f"{RESTARTS} optim.schedule=cosine", "optim.cycle_steps=400: has no meaning", RESTARTS),
    (
        "optim.restart_warmup_steps=10",
        "has no meaning with optim.schedule=cosine; choose optim=cosine_restarts, or optim.restart_warmup_steps=0",
        "optim.restart_warmup_steps=0",
    ),
    ("data.seq_len=2048", "is above model.max_position_embeddings=1024", "data.seq_len=1024"),
    ("strategy.subspace.rank=129", "is above 128, the short side of", "strategy.subspace.rank=128"),
    (
        "strategy.subspace.rank=65 model.num_key_value_heads=2",
        "is above 64, the short side of self_attn.k_proj (64 x 128)",
        "strategy.subspace.rank=64 model.num_key_value_heads=2",
    ),
    (
        "strategy.subspace.rank=65 model.num_key_value_heads=2 strategy.select=['*.self_attn.*.weight']",
        "is above 64",
        "strategy.subspace.rank=65 model.num_key_value_heads=2 strategy.select=['*.mlp.*.weight']",
    ),
    ("model.num_attention_heads=3", "must divide model.hidden_size=128", "model.num_attention_heads=8"),
    ("model.num_attention_heads=128", "an odd number of dimensions", "model.num_attention_heads=64"),
    ("model.num_key_value_heads=3", "must divide model.num_attention_heads=4", "model.num_key_value_heads=2"),
    ("data.mask_documents=true data.packing=pad", "needs data.packing=concat", "data.mask_documents=true"),
    ("data.train=[]", "names no files", "data.train=[x.jsonl]"),
    ("data.tokenizer=", "is empty", "data.tokenizer=some/folder"),
    ("precision.weights=bfloat16", "means weights in float32", "precision=bf16"),
    ("precision=bf16 precision.weights=float32", "means weights in bfloat16", "precision=bf16_mixed"),
    (
        "precision=bf16 precision.compute=bf16-mixed",
        "means weights in float32",
        "precision=bf16 precision.state=float32",
    ),
    ("precision.rounding=stochastic", "choose precision=bf16_sr", "precision=bf16_sr"),
    ("precision.rounding=compensated", "choose precision=bf16_kahan", "precision=bf16_kahan"),
    (
        "precision.count_lost_updates=true",
        "counts among weights in bfloat16",
        "precision=bf16 precision.count_lost_updates=true",
    ),
    ("run=somewhere", "training takes no run=", "run_name=somewhere"),
    ("resume=nowhere", "must be auto, false, or a checkpoint or run folder that exists", "resume=false"),
    ("resume=yes", "must be auto, false", "resume=auto"),
    ("strategy.select=[]", "names no parameter for strategy.inner", "strategy.select=['*.mlp.*.weight']"),
    ("~strategy.lift", "is missing beside strategy.subspace", "strategy/lift=backproject"),
    ("~strategy.inner", "choose one with strategy/inner=NAME", "strategy/inner=adamw"),
    ("~strategy.rest", "choose the rule for all other parameters", "strategy/rest=adamw"),
    ("~strategy.subspace", "strategy.lift: has no meaning without a subspace", "strategy/subspace=randomized"),
    (
        "strategy=full strategy.select=['*.weight']",
        "has no meaning without a rule for what it selects",
        "strategy=full",
    ),
    ("strategy=full strategy/inner=adamw", "names no parameter for strategy.inner", "strategy=full"),
    ("strategy=full strategy/feedback=error", "strategy.feedback: has no meaning without a subspace", "strategy=full"),
    ("strategy.subspace.rank=8 strategy.subspace.density=0.1", "says the same as", "strategy.subspace.density=0.1"),
    ("strategy=frugal strategy.subspace.every=1", "no moment would outlive one", "strategy=frugal"),
    ("strategy.subspace.density=1.5", "must be at most 1", "strategy.subspace.density=0.5"),
    ("strategy=galore strategy/merge=periodic", "has no layers to fold", "strategy=relora"),
    (
        "strategy=fast_forward strategy.repeat.every=1300",
        "no update would be repeated",
        "strategy=galore strategy/repeat=fast_forward",
    ),
    (
        "strategy=galore strategy/repeat=fast_forward precision=int8",
        "an update moves codes by whole steps",
        "strategy=galore strategy/repeat=fast_forward precision=bf16",
    ),
    (
        "strategy=fast_forward trainer=fsdp trainer.devices=2",
        "leaves each device a part of what is trained",
        "strategy=fast_forward trainer=ddp trainer.devices=2",
    ),
    ("strategy=lora strategy.weights.rank=129", "is above 128, the short side of mlp.down_proj", "strategy=lora"),
    ("strategy=relora strategy.merge.every=1300", "no merge would come", "strategy=relora strategy.merge.every=600"),
    ("strategy=relora strategy.merge.every=100 strategy.merge.delay=100", "[0, 100)", "strategy=relora"),
    (
        "strategy=relora optim=cosine_restarts strategy.merge.every=300",
        "would drift apart",
        "strategy=relora optim=cosine_restarts strategy.merge.every=200",
    ),
    ("model=hf data.tokenizer=x", "needs model.path=FOLDER", "model=hf model.path=gpt2"),
    (
        "model.attention=flash_attention_2 trainer.accelerator=cpu",
        "runs on GPUs only",
        "model.attention=flash_attention_2 trainer.accelerator=gpu",
    ),
]

NO_CLIP = "optim.grad_clip=null"
BACKWARD, PROJECT = "strategy.when=in_backward", "strategy.when=project_in_backward"
WINDOW = "trainer.total_batch_size=16"
FULL = "strategy=full"
PROJECTED = "trainer.reduce=projected"
LDADAM = "strategy=ldadam optim.grad_clip=null strategy.when=project_in_backward"
STEPPING: list[tuple[str, str, str]] = [
    (f"{BACKWARD} {NO_CLIP} {WINDOW}", "cannot add up the 4 micro-batches", f"{PROJECT} {NO_CLIP} {WINDOW}"),
    (
        f"{BACKWARD} {NO_CLIP} {WINDOW}",
        "trainer.total_batch_size=4",
        f"{BACKWARD} {NO_CLIP} trainer.total_batch_size=4",
    ),
    (BACKWARD, "the global norm is known only after the last gradient", f"{BACKWARD} {NO_CLIP}"),
    (BACKWARD, "use strategy.when=project_in_backward", PROJECT),
    (f"{PROJECT} {WINDOW}", "the norm of a sum of 4 gradients cannot be known", f"{PROJECT} {WINDOW} {NO_CLIP}"),
    (f"{PROJECT} {WINDOW}", "optim.clip_norm_of=projected", f"{PROJECT} {WINDOW} optim.clip_norm_of=projected"),
    (f"{PROJECT} {WINDOW}", "strategy.when=after_backward", WINDOW),
    (f"{FULL} {PROJECT}", "has no subspace", f"{FULL} {BACKWARD} {NO_CLIP}"),
    (f"{LDADAM} {WINDOW}", "would add the error to every one", LDADAM),
    (f"{FULL} optim.clip_norm_of=projected", "no subspace to project into", FULL),
    (f"{NO_CLIP} optim.clip_norm_of=projected", "nothing is clipped", "optim.clip_norm_of=projected"),
    (f"{PROJECTED} {NO_CLIP}", "one device has nobody to average with", f"{PROJECTED} {NO_CLIP} trainer.devices=2"),
    (f"{PROJECTED} trainer.devices=2", "is not known where small ones are averaged", "trainer.devices=2"),
    (f"{PROJECTED} trainer.devices=2 {FULL} {NO_CLIP}", "has no subspace", f"trainer.devices=2 {FULL} {NO_CLIP}"),
    (
        f"{PROJECTED} trainer.devices=2 strategy=ldadam {NO_CLIP}",
        "keeps what the subspace leaves out",
        f"{PROJECTED} trainer.devices=2 {NO_CLIP}",
    ),
    (
        f"{PROJECTED} trainer.devices=2 trainer.strategy=fsdp {NO_CLIP}",
        "gives each a share of it",
        f"{PROJECTED} trainer.devices=2 trainer.strategy=ddp {NO_CLIP}",
    ),
]


@pytest.mark.parametrize("refused, reason, allowed", [*REFUSED_AND_ALLOWED, *STEPPING])
def test_rule(refused: str, reason: str, allowed: str, faults: Faults) -> None:
    found = faults(*refused.split(" "))
    assert any(reason in fault for fault in found), found
    assert faults(*allowed.split(" ")) == []


def with_value(key: str, value: Any) -> RunConfig:
    """The default configuration with one value changed after composing, as a library would."""
    changed = copy.deepcopy(DEFAULT)
    *parents, name = key.split(".")
    node: Any = changed
    for parent in parents:
        node = node[parent] if isinstance(node, dict) else getattr(node, parent)
    if isinstance(node, dict):
        node[name] = value
    else:
        setattr(node, name, value)
    return changed


@pytest.mark.parametrize("key", sorted({*LOWER_BOUNDS, *UPPER_BOUNDS}))
def test_bounds(key: str) -> None:
    least, allowed = LOWER_BOUNDS[key]
    outside = least - 1 if allowed else least
    found = cross_checks(with_value(key, outside))
    assert any(fault.startswith(f"{key}={outside}: must be") for fault in found), found
    assert not any(fault.startswith(f"{key}=") and "must be at least" in fault for fault in cross_checks(DEFAULT))
    if key in UPPER_BOUNDS:
        assert any("must be at most" in fault for fault in cross_checks(with_value(key, UPPER_BOUNDS[key] + 1)))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value: str, faults: Faults) -> None:
    assert faults(f"optim.lr={value}")
    assert faults(f"optim.grad_clip={value}")


def test_bounds_of_parts(faults: Faults) -> None:
    assert any(
        "must be at least 1" in f for f in faults("strategy/subspace=randomized", "strategy.subspace.iterations=0")
    )
    assert any("each must lie in [0, 1)" in fault for fault in faults("strategy.inner.betas=[0.9,1]"))


@pytest.mark.parametrize(
    "words, reason",
    [
        ("task=export", "out: task=export needs out=FOLDER"),
        ("task=data_prepare", "out: task=data_prepare needs out=FOLDER"),
        ("task=generate", "run: task=generate needs run=FOLDER"),
        ("task=evaluate", "run: task=evaluate needs run=FOLDER"),
        ("task=data_prepare out=O data.source=tokens", "is already prepared"),
    ],
)
def test_tasks_need_their_folders(words: str, reason: str, faults: Faults) -> None:
    assert any(reason in fault for fault in faults(*words.split()))


def test_missing_logger_package_names_the_extra(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent: Callable[[str], Any] = lambda name: None if name in ("wandb", "tensorboard") else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    for name in ("wandb", "tensorboard"):
        assert f"pip install -e '.[{name}]'" in faults(f"logger={name}")[0]
    assert faults("logger=csv") == []


def test_accumulation_is_derived() -> None:
    assert micro_batches(compose([])) == 1
    assert micro_batches(compose([WINDOW])) == 4
    assert micro_batches(compose(["recipe=galore_1b"])) == 4


def test_smallest_side_is_unknown_for_other_models() -> None:
    config = compose(["model=hf", "model.path=gpt2", "strategy.subspace.rank=4096"])
    assert smallest_side(config, config.strategy.select) is None


def test_tokenizer_of_another_model_is_its_own_unless_asked_for() -> None:
    assert compose(["model=hf", "model.path=gpt2"]).data.tokenizer == "gpt2"
    assert compose(["model=hf", "model.path=gpt2", "data.tokenizer=other"]).data.tokenizer == "other"
