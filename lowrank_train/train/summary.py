"""What is left of a run when it is done: the numbers of result.json, a paragraph, a picture."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank_train.checkpoint_shards import whole_shape
from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer
from lowrank_train.evaluate.generate import sample
from lowrank_train.evaluate.heads import GlueHead
from lowrank_train.evaluate.perplexity import Evaluation
from lowrank_train.memory.counting import weights_bytes
from lowrank_train.memory.devices import device_name
from lowrank_train.memory.plan import planned
from lowrank_train.report.page import CARD_FILE, write_page
from lowrank_train.report.result import hardware, library_versions, project_commit
from lowrank_train.train.module import RunModule
from lowrank_train.train.run_data import RunData
from lowrank_train.train.run_folder import RunFolder

log = logging.getLogger(__name__)


def summarize(
    config: RunConfig,
    folder: RunFolder,
    module: RunModule,
    data: RunData,
    of_devices: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The content of result.json; `of_devices` is what of_all_devices() has found."""
    counters = module.counters
    commit, changed = project_commit()
    return {
        **(of_glue(config, module, data) if data.rows is not None else of_text(module, data)),
        "tokens_per_sec": counters.tokens_per_sec,
        "positions_per_sec": counters.positions_per_sec,
        "peak_memory_bytes": counters.peak_memory_bytes,
        "state_bytes": of_devices["state_bytes"],
        "weights_bytes": of_devices["weights_bytes"],
        "parameters": sum(whole_shape(param).numel() for param in module.model.parameters()),
        "trainable_parameters": sum(
            math.prod(row.shape) for row in module.strategy.assignment(module.model) if row.role != "frozen"
        ),
        "steps": counters.evaluation["step"],
        "tokens": counters.tokens,
        "positions": counters.positions,
        "seconds": counters.elapsed_sec,
        "sessions": counters.sessions,
        "data_ended": counters.data_ended,
        "refreshes": counters.refreshes,
        "refresh_sec": counters.refresh_sec,
        "skipped_tensors": counters.skipped_tensors,
        "model": config.model.name,
        "strategy": config.strategy.name,
        "data": config.data.task or config.data.name,
        "precision": config.precision.name,
        "seed": config.seed,
        "commit": commit,
        "uncommitted_changes": changed,
        "tokenizer_fingerprint": module.facts["tokenizer"],
        "data_fingerprint": module.facts["data"],
        "versions": library_versions(),
        "hardware": hardware(device, device_name(device), config.trainer.devices * config.trainer.num_nodes),
        "sample": of_devices["sample"],
        "planned": planned_memory(config),
        "run_folder": str(folder.path),
        "loss_curve": str(folder.path / "loss.png"),
        "card": str(folder.path / CARD_FILE),
    }


def of_text(module: RunModule, data: RunData) -> dict[str, Any]:
    """How well the model predicts text, by the last evaluation."""
    assert data.unigram is not None, "text has frequencies"
    found = Evaluation(**{key: value for key, value in module.counters.evaluation.items() if key != "step"})
    return {
        "val_loss": found.loss,
        "val_perplexity": found.perplexity,
        "val_tokens": found.num_targets,
        "unigram_perplexity": data.unigram(),
        "papers_val_loss": found.papers_loss,
        "papers_val_perplexity": found.papers_perplexity,
        "best_val_loss": module.counters.best_evaluation["loss"],
        "best_step": module.counters.best_evaluation["step"],
    }


def of_glue(config: RunConfig, module: RunModule, data: RunData) -> dict[str, Any]:
    """The official metrics of the last and of the best evaluation, and those of the commonest label."""
    assert isinstance(module.head, GlueHead), "the rows of a task have its head"
    last, best = module.counters.evaluation, module.counters.best_evaluation
    epoch = config.trainer.eval_every_steps if config.trainer.epochs is not None else None
    return {
        "val_loss": last["loss"],
        "val_rows": last["num_targets"],
        "metrics": last["metrics"],
        "best_metrics": best["metrics"],
        "best_step": best["step"],
        "best_by": list(module.head.task.best_by),
        "updates_per_epoch": epoch,
        "commonest_label_metrics": module.head.of_the_commonest_label(data.labels, data.validation(0, 1)),
    }


def of_all_devices(
    config: RunConfig, module: RunModule, data: RunData, tokenizer: Tokenizer, device: torch.device
) -> dict[str, Any]:
    """Text the model writes, and the bytes of state and weights on the device that holds most.

    Called on all ranks at once where the model lies in shards, since each forward pass gathers them.
    """
    held = (module.optimizer.state_bytes(), weights_bytes(module.model))
    state, weights = max(
        module.gather_over_ranks(held) if module.sharded else [held], key=lambda one: sum(one[0].values()) + one[1]
    )
    model = module.model if module.sharded else module.model.to(device)
    with module.computing():
        text = said(config, model, data, tokenizer) if data.rows is None else ""
    return {"state_bytes": state, "weights_bytes": weights, "sample": text}


def planned_memory(config: RunConfig) -> dict[str, Any] | None:
    """What `lowrank plan` says of this run, to stand beside what was measured; None where it cannot be planned."""
    try:
        found = planned(config)
    except Exception as error:  # noqa: BLE001  (a run that is done is worth more than its plan)
        log.warning("this run's memory could not be planned: %s", (str(error).splitlines() or [repr(error)])[0])
        return None
    return {
        "persistent_bytes": found.persistent_bytes,
        "peak_bytes": found.peak_bytes,
        "peak_phase": found.peak_phase,
        "needed_bytes": found.needed_bytes,
        "complete": found.complete,
    }


def said(config: RunConfig, model: PreTrainedModel, data: RunData, tokenizer: Tokenizer) -> str:
    """What the model says: to the first prompt of the validation data, where there are prompts."""
    if data.sampler is None:
        return sampled_paragraph(config, model, tokenizer)
    first = data.sampler.answers(model, config.trainer.steps)[0]
    return f"{first['prompt'].strip()}\n{first['completion'].strip()}"


def sampled_paragraph(config: RunConfig, model: PreTrainedModel, tokenizer: Tokenizer) -> str:
    """Some text the model writes; from a plain word where the tokenizer has no mark to start from."""
    settings = dataclasses.replace(config.generate, num_samples=1)
    try:
        return sample(model, tokenizer, settings, seed=config.seed)[0].strip()
    except UserError:
        return sample(model, tokenizer, dataclasses.replace(settings, prompt="The"), seed=config.seed)[0].strip()


def draw(folder: RunFolder) -> None:
    """loss.png and card.html, of what lies in the folder."""
    write_page(folder.path)
