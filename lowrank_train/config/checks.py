"""Rules that tie keys together; all of them are tried, and nothing is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from lowrank_train.config.bounds import bound_faults
from lowrank_train.config.chat_checks import chat_faults
from lowrank_train.config.fsdp_checks import fsdp_faults
from lowrank_train.config.glue_checks import glue_faults
from lowrank_train.config.parallel_checks import replication_faults
from lowrank_train.config.repeat_checks import repeat_faults
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import (
    micro_batches,
    stepping_faults,
    strategy_faults,
    world_size,
)
from lowrank_train.config.weights_checks import TASKS_THAT_TRAIN
from lowrank_train.config.zero_checks import zero_faults

__all__ = ["TASKS_WITH_RUN", "cross_checks", "micro_batches", "world_size"]

TASKS_WITH_RUN = ("export", "generate", "evaluate")


def cross_checks(config: RunConfig) -> list[str]:
    """Every broken rule, as a sentence with the numbers and the way out."""
    out_of_bounds = list(bound_faults(config))
    faults = [*out_of_bounds, *_task(config), *_data(config), *glue_faults(config), *chat_faults(config)]
    faults += _precision(config)
    if not out_of_bounds:  # what follows divides by these numbers
        faults += _model(config)
    if config.task in TASKS_THAT_TRAIN and not faults:
        faults += [
            *_batch(config),
            *_restarts(config),
            *strategy_faults(config),
            *stepping_faults(config),
            *replication_faults(config),
            *fsdp_faults(config),
            *zero_faults(config),
            *repeat_faults(config),
            *(_machine(config) if config.task == "train" else []),
        ]
    if config.task == "explain" and not faults:
        faults += strategy_faults(config)
    return faults


def _task(config: RunConfig) -> Iterator[str]:
    if config.task in TASKS_WITH_RUN and config.run is None:
        yield f"run: task={config.task} needs run=FOLDER, a run folder or a Hugging Face folder"
    if config.fit and config.card is None and config.budget_gb is None:
        yield "fit=true: needs what it is to fit; give card=NAME, such as card=4090, or budget_gb=24"
    if config.task in ("export", "data_prepare") and config.out is None:
        yield f"out: task={config.task} needs out=FOLDER, the folder to write"
    if config.task == "train":
        if config.run is not None:
            yield f"run={config.run}: training takes no run=; to go on with a run write resume={config.run}"
        if config.resume not in ("auto", "false") and not (config.resume and Path(config.resume).exists()):
            yield f"resume={config.resume}: must be auto, false, or a checkpoint or run folder that exists"


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.kind == "hf":
        if not model.path and config.task != "data_prepare" and config.run is None:
            yield "model.path: model=hf needs model.path=FOLDER or the model's name on the hub"
        if model.path and (Path(model.path) / "checkpoints").is_dir() and (Path(model.path) / "config.yaml").is_file():
            export = f"lowrank export run={model.path} out=FOLDER"
            yield f"model.path={model.path}: is a run folder; export it first: {export}"
        return
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads}: must divide model.hidden_size={model.hidden_size}"
        )
    elif (model.hidden_size // model.num_attention_heads) % 2:
        yield (
            f"model.num_attention_heads={model.num_attention_heads}: model.hidden_size={model.hidden_size} leaves each "
            "head an odd number of dimensions, and rotary positions turn them in pairs"
        )
    if model.num_key_value_heads and model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"model.num_key_value_heads={model.num_key_value_heads}: must divide "
            f"model.num_attention_heads={model.num_attention_heads}"
        )


def _data(config: RunConfig) -> Iterator[str]:
    data, model = config.data, config.model
    if config.task in ("train", "data_prepare") and not data.train and data.source != "glue":
        yield "data.train: names no files; give data.train=[FILE,...] or choose data="
    if not data.tokenizer and config.task in ("train", "data_prepare"):
        yield "data.tokenizer: is empty; name a SentencePiece .model, a tokenizer.json, a folder, or a name on the hub"
    if data.mask_documents and data.packing == "pad" and data.source != "chat":
        yield (
            "data.mask_documents=true: needs data.packing=concat; data.packing=pad puts a single document into a row"
        )
    if (
        model.kind == "llama"
        and config.task in ("train", "plan", "evaluate")
        and data.seq_len > model.max_position_embeddings
    ):
        yield (
            f"data.seq_len={data.seq_len}: is above model.max_position_embeddings={model.max_position_embeddings}; "
            "shorten the one or lengthen the other"
        )
    if data.shuffle_documents == "all" and data.source != "tokens":
        yield (
            f"data.shuffle_documents=all: needs documents that can be reached by number, and data.source={data.source} "
            "is read from its beginning; prepare it (lowrank data prepare) and use data=tokens, or say how many are "
            "shuffled together, such as data.shuffle_documents=10000"
        )
    if config.task == "data_prepare" and data.source == "tokens":
        yield "data.source=tokens: is already prepared; choose the source it is to be made from"


def _precision(config: RunConfig) -> Iterator[str]:
    precision = config.precision
    wanted = "bfloat16" if precision.compute == "bf16-true" else "float32"
    if precision.weights != wanted:
        yield (
            f"precision.weights={precision.weights}: precision.compute={precision.compute} means weights in {wanted}; "
            "choose precision=fp32, bf16_mixed or bf16"
        )
    if precision.int8_group is not None:
        yield from _int8(config)
    if precision.weights != "bfloat16":
        if precision.rounding != "nearest":
            choice = {"stochastic": "bf16_sr", "compensated": "bf16_kahan"}[precision.rounding]
            yield (
                f"precision.rounding={precision.rounding}: is for weights in bfloat16, and these are "
                f"{precision.weights}; choose precision={choice}, or precision.rounding=nearest"
            )
        if precision.count_lost_updates:
            yield (
                f"precision.count_lost_updates=true: counts among weights in bfloat16, and these are "
                f"{precision.weights}; choose precision=bf16, bf16_sr or bf16_kahan"
            )


def _int8(config: RunConfig) -> Iterator[str]:
    precision, key = config.precision, f"precision.int8_group={config.precision.int8_group}"
    if precision.weights != "bfloat16":
        yield (
            f"{key}: codes are decoded to bfloat16 for products, and precision.compute={precision.compute} with "
            f"precision.weights={precision.weights} would make them wider than they are; choose precision=int8, or "
            "precision.int8_group=null"
        )
    if precision.rounding == "compensated":
        yield (
            "precision.rounding=compensated: would keep 2 bytes beside each code of 1 byte, more than bfloat16 takes "
            "whole; use precision.rounding=stochastic (precision=int8), or precision=bf16_kahan"
        )
    if config.strategy.weights is not None:
        yield (
            f"{key}: is for matrices that are trained as they are, and strategy {config.strategy.name} keeps them in "
            "another form; use a strategy with dense matrices such as strategy=q_galore, or precision=bf16_sr"
        )


def _batch(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    rows = trainer.batch_size * world_size(config)
    total = trainer.total_batch_size
    if total is not None and total % rows:
        lower, upper = total // rows * rows, (total // rows + 1) * rows
        near = f"{lower} or {upper}" if lower else str(upper)
        yield (
            f"trainer.total_batch_size={total}: must be a multiple of the {rows} rows of one micro-batch "
            f"(trainer.batch_size={trainer.batch_size} x {world_size(config)} devices), such as {near}"
        )
    if trainer.epochs is None and config.optim.warmup_steps > trainer.steps:
        yield (
            f"optim.warmup_steps={config.optim.warmup_steps}: is above trainer.steps={trainer.steps}; usual is "
            f"a tenth, optim.warmup_steps={trainer.steps // 10}"
        )


def _restarts(config: RunConfig) -> Iterator[str]:
    optim, steps = config.optim, config.trainer.steps
    cycle, rewarm = optim.cycle_steps, optim.restart_warmup_steps
    if optim.schedule != "cosine_restarts":
        for key, value, none in (("cycle_steps", cycle, None), ("restart_warmup_steps", rewarm, 0)):
            if value != none:
                yield (
                    f"optim.{key}={value}: has no meaning with optim.schedule={optim.schedule}; choose "
                    f"optim=cosine_restarts, or optim.{key}={'null' if none is None else none}"
                )
        return
    if cycle is None:
        yield (
            "optim.cycle_steps=null: optim.schedule=cosine_restarts needs the updates from one restart to the next; "
            f"give a divisor of trainer.steps={steps}, or choose optim=cosine"
        )
        return
    if steps % cycle:
        lower, upper = steps // cycle * cycle, (steps // cycle + 1) * cycle
        near = f"{lower} or {upper}" if lower else str(upper)
        yield f"optim.cycle_steps={cycle}: must divide trainer.steps={steps}; choose another, or trainer.steps={near}"
    for key, value in (("warmup_steps", optim.warmup_steps), ("restart_warmup_steps", rewarm)):
        if value > cycle:
            yield (
                f"optim.{key}={value}: is above optim.cycle_steps={cycle}, so the next restart would come before the "
                "warm-up ends; shorten the one or lengthen the other"
            )


def _machine(config: RunConfig) -> Iterator[str]:
    needed = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(config.logger.name)
    if needed and importlib.util.find_spec(needed) is None:
        yield (
            f"logger={config.logger.name}: the package {needed} is not installed; pip install -e '.[{needed}]', or "
            "logger=csv"
        )
    if config.model.attention.startswith("flash_attention") and config.trainer.accelerator == "cpu":
        yield f"model.attention={config.model.attention}: runs on GPUs only; on a CPU use model.attention=sdpa"
