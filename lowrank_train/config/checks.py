"""Rules that tie keys together or bound their values; all of them are tried, and nothing is loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

from lowrank_train.config.chat_checks import chat_faults
from lowrank_train.config.fsdp_checks import fsdp_faults
from lowrank_train.config.glue_checks import glue_faults
from lowrank_train.config.parallel_checks import replication_faults
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import (
    micro_batches,
    stepping_faults,
    strategy_faults,
    value_of,
    world_size,
)
from lowrank_train.config.weights_checks import TASKS_THAT_TRAIN
from lowrank_train.config.zero_checks import zero_faults

__all__ = ["TASKS_WITH_RUN", "cross_checks", "micro_batches", "world_size"]

TASKS_WITH_RUN = ("export", "generate", "evaluate")

# key -> (smallest value, whether that value itself is allowed)
LOWER_BOUNDS: dict[str, tuple[float, bool]] = {
    "seed": (0, True),
    "model.hidden_size": (1, True),
    "model.intermediate_size": (1, True),
    "model.num_hidden_layers": (1, True),
    "model.num_attention_heads": (1, True),
    "model.num_key_value_heads": (1, True),
    "model.vocab_size": (1, True),
    "model.max_position_embeddings": (1, True),
    "model.rms_norm_eps": (0, False),
    "model.rope_theta": (0, False),
    "model.initializer_range": (0, False),
    "model.loss_chunk_tokens": (0, True),
    "data.seq_len": (2, True),  # the first token of a row has nothing to be predicted from
    "data.shuffle_documents": (0, True),
    "data.num_workers": (0, True),
    "data.validation_tokens": (1, True),
    "data.samples": (0, True),
    "data.sample_tokens": (1, True),
    "optim.lr": (0, False),
    "optim.warmup_steps": (0, True),
    "optim.warmup_ratio": (0, True),
    "optim.min_lr_ratio": (0, True),
    "optim.cycle_steps": (1, True),
    "optim.restart_warmup_steps": (0, True),
    "optim.weight_decay": (0, True),
    "optim.grad_clip": (0, False),
    "precision.int8_group": (1, True),
    "trainer.steps": (1, True),
    "trainer.epochs": (1, True),
    "trainer.batch_size": (1, True),
    "trainer.total_batch_size": (1, True),
    "trainer.eval_every_steps": (0, True),
    "trainer.save_every_steps": (0, True),
    "trainer.keep_checkpoints": (1, True),
    "trainer.log_every_steps": (1, True),
    "trainer.devices": (1, True),
    "trainer.num_nodes": (1, True),
    "trainer.threads": (1, True),
    "budget_gb": (0, False),
    "generate.max_new_tokens": (1, True),
    "generate.temperature": (0, True),
    "generate.top_p": (0, False),
    "generate.num_samples": (1, True),
    "strategy.subspace.rank": (1, True),
    "strategy.subspace.density": (0, False),
    "strategy.subspace.every": (1, True),
    "strategy.subspace.iterations": (1, True),
    "strategy.subspace.cold_iterations": (1, True),
    "strategy.lift.scale": (0, False),
    "strategy.inner.eps": (0, False),
    "strategy.rest.eps": (0, False),
}
UPPER_BOUNDS: dict[str, float] = {
    "seed": 2**32 - 1,
    "optim.warmup_ratio": 1,
    "optim.min_lr_ratio": 1,
    "generate.top_p": 1,
    "strategy.subspace.density": 1,
}


def cross_checks(config: RunConfig) -> list[str]:
    """Every broken rule, as a sentence with the numbers and the way out."""
    out_of_bounds = list(_bounds(config))
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
            *(_machine(config) if config.task == "train" else []),
        ]
    if config.task == "explain" and not faults:
        faults += strategy_faults(config)
    return faults


def _bounds(config: RunConfig) -> Iterator[str]:
    for key, (least, allowed) in LOWER_BOUNDS.items():
        value = value_of(config, key)
        if not isinstance(value, int | float):  # absent, or a list where another part has a number
            continue
        if not (math.isfinite(value) and (value > least or (allowed and value == least))):
            yield f"{key}={value}: must be {'at least' if allowed else 'above'} {least:g}"
    for key, most in UPPER_BOUNDS.items():
        value = value_of(config, key)
        if isinstance(value, int | float) and value > most:
            yield f"{key}={value}: must be at most {most}"
    for key in ("strategy.inner.betas", "strategy.rest.betas"):
        betas = value_of(config, key)
        if isinstance(betas, tuple) and any(not 0 <= beta < 1 for beta in betas):
            yield f"{key}={list(betas)}: each must lie in [0, 1)"


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
