"""What can be changed of a run so that it takes less memory: the words for it, and its price, the cheapest first."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lowrank_train.config import paths
from lowrank_train.config.checks import cross_checks, world_size
from lowrank_train.config.errors import UserError
from lowrank_train.config.files import load_container
from lowrank_train.config.schema import PrecisionConfig, RunConfig
from lowrank_train.memory.fake_run import optimizer_for, prepared

CHUNKED_LOSS = (256, 64)
"""Positions whose logits exist at one time, below the default of 1,024."""
STORAGES = ("fp32", "bf16", "q8", "q4")
"""Files of conf/strategy/storage, the most faithful first; others come after them."""
PRECISIONS = ("fp32", "bf16_mixed", "bf16_kahan", "bf16_sr", "bf16")
"""Files of conf/precision, the most faithful first; others come after them."""
LEAST_RANK, RANK_HALVINGS = 4, 3


@dataclass(frozen=True)
class Change:
    """Keys and choices as they are written on the command line, and what they cost besides."""

    words: dict[str, str]
    price: str


@dataclass(frozen=True)
class Axis:
    """Changes that exclude each other, the cheapest first."""

    name: str
    changes: list[Change]
    of_what_is_kept: bool = False  # saves nothing unless less is kept between updates


def rows_of_update(config: RunConfig) -> int:
    """Rows that one device sees in an update."""
    devices = world_size(config)
    return (config.trainer.total_batch_size or config.trainer.batch_size * devices) // devices


def micro_batch(config: RunConfig, rows: int) -> Change:
    """The same update in micro-batches of so many rows."""
    update = rows_of_update(config)
    words = {"trainer.batch_size": str(rows)}
    if config.trainer.total_batch_size is None:
        words["trainer.total_batch_size"] = str(update * world_size(config))
    if rows == update:
        return Change(words, "the whole update in one micro-batch")
    return Change(words, f"the same update in {update // rows} micro-batches; small ones leave a card idle")


def larger_update(config: RunConfig, rows: int) -> Change:
    """An update of one micro-batch of so many rows."""
    words = {"trainer.batch_size": str(rows), "trainer.total_batch_size": str(rows * world_size(config))}
    return Change(words, "another run: more rows an update")


def axes(config: RunConfig) -> Iterator[Axis]:
    """All that may be tried besides the micro-batch, in the order of its price."""
    yield Axis("checkpointing", list(_checkpointing(config)))
    yield Axis("moment of stepping", list(_moments(config)))
    yield Axis("chunked loss", list(_loss(config)))
    yield Axis("bits of the state", list(_storages()), of_what_is_kept=True)
    yield Axis("rank", list(_ranks(config)), of_what_is_kept=True)
    yield Axis("precision", list(_precisions(config)))


def _checkpointing(config: RunConfig) -> Iterator[Change]:
    if not config.model.activation_checkpointing:
        price = "each layer is computed twice, about a third more compute; the numbers stay the same"
        yield Change({"model.activation_checkpointing": "true"}, price)


def _moments(config: RunConfig) -> Iterator[Change]:
    if config.strategy.when == "after_backward":
        price = "no compute; no norm of full gradients over several micro-batches"
        yield Change({"strategy.when": "project_in_backward"}, price)
    if config.strategy.when != "in_backward":
        rows = {"trainer.batch_size": str(rows_of_update(config))}
        price = "no compute; the update in one micro-batch, no clipping"
        yield Change({"strategy.when": "in_backward", **rows}, price)


def _loss(config: RunConfig) -> Iterator[Change]:
    now = config.model.loss_chunk_tokens
    for chunk in CHUNKED_LOSS:
        if now == 0 or chunk < now:
            price = "the same loss; the head runs in smaller products"
            yield Change({"model.loss_chunk_tokens": str(chunk)}, price)


def _storages() -> Iterator[Change]:
    for name in _in_order("strategy/storage", STORAGES):
        price = f"rounded state, a risk for accuracy: {head_of_file(f'strategy/storage/{name}')}"
        yield Change({"strategy/storage": name}, price)


def _ranks(config: RunConfig) -> Iterator[Change]:
    for axis, loss in (("subspace", "fewer directions of each gradient"), ("weights", "less room in each matrix")):
        part = getattr(config.strategy, axis) or {}
        for key in ("rank", "density"):
            now = part.get(key)
            if not isinstance(now, int | float) or isinstance(now, bool):
                continue
            for halving in range(1, RANK_HALVINGS + 1):
                smaller = now // 2**halving if isinstance(now, int) else now / 2**halving
                if isinstance(now, float) or smaller >= LEAST_RANK:
                    price = f"{loss}: a risk for accuracy, the larger the smaller the {key}"
                    yield Change({f"strategy.{axis}.{key}": f"{smaller:g}"}, price)


def _precisions(config: RunConfig) -> Iterator[Change]:
    files = _in_order("precision", PRECISIONS)
    now = config.precision.name
    for name in files[files.index(now) + 1 :] if now in files else []:
        yield Change({"precision": name}, head_of_file(f"precision/{name}"))


def _in_order(group: str, declared: Sequence[str]) -> list[str]:
    """The choices of a group, the declared ones first."""
    names = sorted(path.stem for path in (paths.CONF / group).glob("*.yaml"))
    return [name for name in declared if name in names] + [name for name in names if name not in declared]


def head_of_file(choice: str) -> str:
    """What the file of a choice says of itself, without what stands in brackets."""
    lines = (paths.CONF / f"{choice}.yaml").read_text(encoding="utf-8").splitlines()
    said = " ".join(line[2:] for line in itertools.takewhile(lambda line: line.startswith("# "), lines))
    return re.sub(r" \([^)]*\)", "", said).rstrip(".")


def load_part(choice: str) -> dict[str, Any]:
    """The keys of a file of conf/."""
    return {
        str(key): value for key, value in load_container(paths.CONF / f"{choice}.yaml").items() if key != "defaults"
    }


def changed(config: RunConfig, words: Mapping[str, str]) -> RunConfig:
    """The configuration as the command line makes it with these words at its end."""
    config = copy.deepcopy(config)
    for key, text in words.items():
        if key == "precision":
            config.precision = PrecisionConfig(**load_part(f"precision/{text}"))
            continue
        node: Any = config
        *above, name = key.replace("/", ".").split(".")
        for step in above:
            node = node[step] if isinstance(node, dict) else getattr(node, step)
        value = load_part(f"{key}/{text}") if "/" in key else yaml.safe_load(text)
        if isinstance(node, dict):
            node[name] = value
        else:
            setattr(node, name, value)
    return config


def refusal(config: RunConfig, vocab_size: int) -> str | None:
    """Why this run would be refused before it begins; None where it would not."""
    faults = cross_checks(config)
    if not faults:
        try:
            model, strategy = prepared(config, vocab_size, 1 if config.model.kind == "llama" else None)
            optimizer_for(config, strategy, model)
        except UserError as error:
            faults = error.faults
    return faults[0] if faults else None
