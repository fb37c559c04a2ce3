"""One run, told in order: folder, tokenizer, data, model, strategy, optimizer, module, trainer, fit, evaluate, card."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from lowrank_train.config.files import to_container
from lowrank_train.config.fsdp_checks import sharded
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.weights_checks import weights_remarks
from lowrank_train.config.zero_checks import require_package, zero_stage
from lowrank_train.data import Tokenizer, tokenizer_of
from lowrank_train.evaluate.loading import DTYPES, pick_device
from lowrank_train.evaluate.samples import SAMPLES_FILE, Samples
from lowrank_train.memory.counting import weights_bytes
from lowrank_train.models import build_model, outputs_of
from lowrank_train.nn.reparam import layers_of
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.parallel import refuse_parallel
from lowrank_train.report.banner import BatchArithmetic, assignment_lines, head_lines, model_sentence
from lowrank_train.report.card import show_card
from lowrank_train.report.console import Console
from lowrank_train.report.result import write_result
from lowrank_train.report.savings import advice, advice_on_layers
from lowrank_train.strategy import Strategy
from lowrank_train.strategy_checks import row_head
from lowrank_train.train.checkpoint_io import FolderCheckpoints
from lowrank_train.train.csv_file import CsvFile, MetricsCsv
from lowrank_train.train.events import EventRunner
from lowrank_train.train.interrupts import Interrupts
from lowrank_train.train.loggers import extra_loggers
from lowrank_train.train.machinery import (
    build_trainer,
    explained_failures,
    is_first_rank,
    leave_together,
    local_rank,
    micro_batches_of,
    quiet_libraries,
)
from lowrank_train.train.module import RunModule
from lowrank_train.train.progress import ProgressDisplay
from lowrank_train.train.recorder import Recorder, metric_columns
from lowrank_train.train.rehearsal import rehearse
from lowrank_train.train.run_chat import prepare_chat, read_chat
from lowrank_train.train.run_data import RunData, fit_model, prepare_data, with_length
from lowrank_train.train.run_folder import CHECKPOINTS, METRICS_FILE, RESULT_FILE, RunFolder, prepare_run_folder
from lowrank_train.train.run_length import RunIsLong, called_off_if_long
from lowrank_train.train.run_state import Stopwatch, random_state, restore_random_state, seed_everything
from lowrank_train.train.saver import Saver
from lowrank_train.train.slurm import AGAIN
from lowrank_train.train.summary import draw, of_all_devices, summarize
from lowrank_train.train.utilization import utilization


def train(config: RunConfig) -> int:
    """Train until done and return 0; UserError for what cannot work, RunStopped for a run that ended early."""
    device = pick_device(config.trainer, local_rank())
    config, chat = read_chat(config)
    config = with_length(config, None if chat is None else len(chat.rows))
    refuse_parallel(config)
    require_package(config)
    with contextlib.closing(prepare_run_folder(config, is_first_rank=is_first_rank())) as folder:
        console = Console(folder.path / "log.txt", silent=not is_first_rank())
        quiet_libraries(console)
        console.say("\n".join(folder.remarks))
        if folder.finished is not None:
            return show_finished(console, folder)
        seed_everything(config.seed, threads=config.trainer.threads)
        tokenizer = tokenizer_of(config) if chat is None else chat.tokenizer
        data = prepare_data(config, tokenizer) if chat is None else prepare_chat(config, chat)
        build = functools.partial(build_module, tokenizer=tokenizer, data=data, device=device)
        generators = random_state()
        module = build(config)
        announce(console, config, folder, module.model, module.strategy, data, device)
        rehearses = config.rehearse if folder.resume_from is None and data.rows is None else False
        if rehearses is True or not fit(config, folder, console, module, data, device, rehearses == "auto"):
            del module
            rehearse(config, console, folder.path, build, tokenizer, device)
            restore_random_state(generators)
            module = build(config)
            fit(config, folder, console, module, data, device)
        if is_first_rank() or module.sharded:
            with explained_failures(config, module):
                of_devices = of_all_devices(config, module, data, tokenizer, device)
        if is_first_rank():
            with explained_failures(config, module):
                result = summarize(config, folder, module, data, of_devices, device)
            write_result(folder.path / RESULT_FILE, result)
            draw(folder)
            show_card(console, result)
        leave_together()
    return 0


def build_module(config: RunConfig, *, tokenizer: Tokenizer, data: RunData, device: torch.device) -> RunModule:
    """Model, strategy and optimizer, always the same of one configuration."""
    with explained_failures(config):
        model = build_model(
            config.model,
            vocab_size=tokenizer.vocab_size,
            dtype=DTYPES[config.precision.weights],
            # A model to be sharded moves to the devices a layer at a time: whole it may be too much for one.
            device="cpu" if sharded(config) or zero_stage(config) == 3 else device,
            seed=config.seed,
            outputs=outputs_of(config.data),
        )
        fit_model(config, model, tokenizer, data.largest_id)
        strategy = prepare_strategy(config, model)
        optimizer = build_optimizer(config, strategy, model)
    return RunModule(
        config, model, strategy, optimizer, data.training, micro_batches=data.micro_batches, facts=data.facts
    )


def prepare_strategy(config: RunConfig, model: PreTrainedModel) -> Strategy:
    """The memory strategy, with the model brought into the form it trains."""
    strategy = Strategy.from_config(
        config.strategy,
        state_dtype=DTYPES[config.precision.state],
        seed=config.seed,
        rounding=config.precision.rounding,
        int8_group=config.precision.int8_group,
        steps=config.trainer.steps,
    )
    strategy.prepare(model)
    return strategy


def build_optimizer(config: RunConfig, strategy: Strategy, model: PreTrainedModel) -> TransformOptimizer:
    """The strategy's optimizer under this run's settings."""
    return strategy.optimizer(
        model,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        grad_clip=config.optim.grad_clip,
        clip_norm_of=config.optim.clip_norm_of,
        micro_batches=micro_batches_of(config.trainer),
        count_lost_updates=config.precision.count_lost_updates,
    )


def announce(
    console: Console,
    config: RunConfig,
    folder: RunFolder,
    model: PreTrainedModel,
    strategy: Strategy,
    data: RunData,
    device: torch.device,
) -> None:
    """What is about to be trained, how, on what, and where it goes."""
    settings = config.trainer
    parameters, assignment = list(model.parameters()), strategy.assignment(model)
    batch = BatchArithmetic(
        settings.batch_size, data.micro_batches, settings.devices * settings.num_nodes, config.data.seq_len
    )
    lines = [
        model_sentence(
            config.model.name,
            sum(p.numel() for p in parameters),
            sum(math.prod(row.shape) for row in assignment if row.role != "frozen"),
            weights_bytes(model),
            config.precision.formats,
        ),
        f"strategy {config.strategy.name}, step {config.strategy.when}, precision {config.precision.name}:",
        *assignment_lines(assignment),
        *head_lines(assignment, row_head(model)),
        f"data {data_sentence(config, data, batch)}; {settings.steps:,} updates",
        *(f"  {remark}" for remark in data.remarks),
        *([utilization(model, config.data.seq_len, device, batch.devices)[1]] if device.type == "cuda" else []),
        f"run folder: {folder.path}",
    ]
    if folder.resume_from is not None:
        lines.append(f"going on after step {folder.step:,}, from {folder.resume_from}")
    console.say("\n".join(lines))
    remarks = (
        *weights_remarks(config),
        advice(config.strategy.name, assignment, DTYPES[config.precision.state].itemsize),
        advice_on_layers(config.strategy.name, layers_of(model).values()),
    )
    for line in filter(None, remarks):
        console.warn(line)


def data_sentence(config: RunConfig, data: RunData, batch: BatchArithmetic) -> str:
    """What an update sees of the data."""
    if data.rows is None:
        return f"{config.data.name}: {config.data.packing}, {batch.sentence()}"
    return f"{config.data.task}: {data.rows:,} rows of at most {config.data.seq_len} tokens, {batch.rows} an update"


def fit(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    module: RunModule,
    data: RunData,
    device: torch.device,
    may_call_off: bool = False,
) -> bool:
    """Train, evaluate and save as the configuration says; RunStopped when a signal ended it, after all is saved.

    False, with `may_call_off`, where the first update tells that it takes long: then nothing has been recorded.
    """
    interrupts, stopwatch, checkpoints = Interrupts(), Stopwatch(), FolderCheckpoints()
    display = ProgressDisplay(console, steps=config.trainer.steps, log_every_steps=config.trainer.log_every_steps)
    loggers, documents = open_tables(config, folder, module) if is_first_rank() else ([], None)
    devices = config.trainer.devices * config.trainer.num_nodes
    recorder = Recorder(
        data.validation,
        interrupts,
        stopwatch,
        console,
        display,
        loggers,
        utilization=utilization(module.model, config.data.seq_len, device, devices)[0],
        documents=documents,
        samples=Samples(data.sampler, folder.path / SAMPLES_FILE, folder.step) if data.sampler is not None else None,
    )
    saver = Saver(
        folder.path / CHECKPOINTS, checkpoints, interrupts, stopwatch, console, resume_from=folder.resume_from
    )
    trainer = build_trainer(
        config,
        device,
        folder=folder.path,
        micro_batches=data.micro_batches,
        callbacks=[
            *([called_off_if_long(config.trainer.steps, interrupts)] if may_call_off else []),
            EventRunner(console),
            recorder,
            saver,
        ],
        loggers=loggers,
        checkpoints=checkpoints,
    )
    try:
        with explained_failures(config, module):
            trainer.fit(module, ckpt_path=folder.resume_from, weights_only=True)
    except RunIsLong:
        return False
    finally:
        for table in [documents, *(logger.file for logger in loggers if isinstance(logger, MetricsCsv))]:
            if table is not None:
                table.close()
    if saver.stopped_by_signal:
        leave_together()
        raise saver.stopped(f" after step {module.last_checkpoint_step:,}; everything is saved. {AGAIN}")
    return True


def open_tables(config: RunConfig, folder: RunFolder, module: RunModule) -> tuple[list[Logger], CsvFile | None]:
    """metrics.csv and the loggers beside it, and documents.csv where wanted, all cut back to the step to go on from."""
    metrics = MetricsCsv(
        folder.path / METRICS_FILE, metric_columns(module.strategy.group_names(module.model), module.head.columns)
    )
    metrics.file.start(folder.step)
    documents = None
    if config.data.log_documents:
        documents = CsvFile(folder.path / "documents.csv", ("step", "rank", "document"))
        documents.start(folder.step)
    others = extra_loggers(config.logger, folder.path, folder.path.name, step=folder.step)
    for logger in others:
        logger.log_hyperparams(to_container(config))
    return [metrics, *others], documents


def show_finished(console: Console, folder: RunFolder) -> int:
    """The card of a run that has nothing left to do, and how to train further."""
    assert folder.finished is not None
    show_card(console, folder.finished)
    console.say(
        f"This run is complete. To train it again: resume=false. To train on from here: "
        f"resume={folder.path} run_name=NAME trainer.steps=MORE"
    )
    return 0
