"""`lowrank support`: which strategy runs with which way of working together, moment of stepping and storage of state.

Nothing is listed by hand: each combination is put to the checks that refuse it at start-up, those of the configuration
first, then those of the built strategy on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from lowrank_train.config import UserError, compose, paths
from lowrank_train.config.checks import cross_checks
from lowrank_train.config.files import load_container
from lowrank_train.config.schema import RunConfig
from lowrank_train.models import meta_model, outputs_of
from lowrank_train.optim.refusals import When
from lowrank_train.parallel import STAND_IN_VOCABULARY, prepared, refusals
from lowrank_train.strategy import Strategy

MOMENTS: tuple[When, ...] = get_args(When)
STORAGES = ("fp32", "bf16", "q8", "q4", "int8")
"""Of the state, as strategy/storage calls them (fp32: none); int8: precision=int8, which takes the weights in too."""
PARALLELISMS: dict[str, dict[str, Any]] = {
    "one": {"strategy": "auto", "devices": 1},
    "ddp": {"strategy": "ddp", "devices": 2},
    "ddp_projected": {"strategy": "ddp", "devices": 2, "reduce": "projected"},
    "fsdp": {"strategy": "fsdp", "devices": 2},
    "zero1": {"strategy": "deepspeed_zero1", "devices": 2},
    "zero2": {"strategy": "deepspeed_zero2", "devices": 2},
    "zero3": {"strategy": "deepspeed_zero3", "devices": 2},
}
"""Name -> the keys of `trainer` that say it."""
LAYERS = 2  # of the model that is built: strategies tell the first from the others at most


@dataclass(frozen=True)
class Cell:
    """One combination, and why it is refused; None for one that runs."""

    strategy: str
    parallelism: str
    moment: str
    storage: str
    reason: str | None


def support_of(words: Sequence[str], strategies: Sequence[str], storages: Sequence[str] = STORAGES) -> Iterator[Cell]:
    """Every combination of these strategies, under the other words of a command line. UserError where none composes."""
    for name in strategies:
        yield from cells(compose([*words, f"strategy={name}", "task=plan"]), name, storages)


def cells(config: RunConfig, name: str, storages: Sequence[str] = STORAGES) -> Iterator[Cell]:
    """Every combination of one strategy."""
    models: dict[bool, PreTrainedModel] = {}
    for storage in storages:
        stored = with_storage(replace(config, task="train", resume="false"), storage)
        built: Strategy | str | None = None
        for parallelism, keys in PARALLELISMS.items():
            for moment in MOMENTS:
                wanted = placed(stored, keys, moment)
                faults = cross_checks(wanted)
                if not faults:
                    built = built or _built(wanted, models)
                    model = models[storage == "int8"]
                    faults = [built] if isinstance(built, str) else refusals(wanted, built, model)
                yield Cell(name, parallelism, moment, storage, faults[0] if faults else None)


def with_storage(config: RunConfig, storage: str) -> RunConfig:
    """The same run with its state, or its weights too, kept otherwise."""
    folder = paths.CONF
    if storage == "int8":
        precision = replace(config.precision, **load_container(folder / "precision" / "int8.yaml"))
        return replace(config, precision=precision, strategy=replace(config.strategy, storage=None))
    part = None if storage == "fp32" else load_container(folder / "strategy" / "storage" / f"{storage}.yaml")
    return replace(config, strategy=replace(config.strategy, storage=part))


def placed(config: RunConfig, keys: dict[str, Any], moment: When) -> RunConfig:
    """The same run on other devices and with another moment of stepping."""
    trainer = replace(config.trainer, accelerator="auto", num_nodes=1, total_batch_size=None, **keys)
    return replace(config, trainer=trainer, strategy=replace(config.strategy, when=moment))


def _built(config: RunConfig, models: dict[bool, PreTrainedModel]) -> Strategy | str:
    """The strategy on a small model without memory, which goes into `models`; or why it cannot be built."""
    coded = config.precision.int8_group is not None
    if coded not in models:
        models[coded] = meta_model(
            replace(config.model, num_hidden_layers=LAYERS),
            vocab_size=config.model.vocab_size or STAND_IN_VOCABULARY,
            dtype=getattr(torch, config.precision.weights),
            outputs=outputs_of(config.data),
        )
    try:
        return prepared(deepcopy(config), models[coded])
    except UserError as error:
        return error.faults[0]
