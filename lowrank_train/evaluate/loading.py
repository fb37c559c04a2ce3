"""Opening what was trained: a run folder (its newest complete checkpoint) or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lowrank_train.checkpoint import Kind, checkpoint_step, load_weights, newest_complete, read_manifest
from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig, TrainerConfig
from lowrank_train.data import Tokenizer, load_tokenizer, tokenizer_of
from lowrank_train.load_errors import user_errors
from lowrank_train.models import auto_class, build_model, outputs_of
from lowrank_train.strategy import Strategy

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Trained:
    """A model ready to be used, with the tokenizer it was trained with."""

    model: PreTrainedModel  # in evaluation mode; for a run, in the form its strategy trained
    tokenizer: Tokenizer
    strategy: Strategy | None  # None: it came from a Hugging Face folder
    source: str  # what was opened, in words
    device: torch.device
    begin_id: int | None = None  # the mark before every text that the model was trained with, where there is one


def quiet_transformers() -> None:
    """No progress bars; and of DeepSpeed, which transformers imports where it is installed, errors alone."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # its level is set anew when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def pick_device(trainer: TrainerConfig, local_rank: int = 0) -> torch.device:
    """The device of this process. UserError when a GPU is asked for and there is none."""
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator is gpu, but torch sees no GPU; use trainer.accelerator=cpu or auto")
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def open_trained(config: RunConfig) -> Trained:
    """The model that `run=` names, on this machine's device. UserError for what is not there or does not fit."""
    if not config.run:
        raise UserError(f"task {config.task} needs run=FOLDER: a run folder or a Hugging Face folder")
    quiet_transformers()
    folder = Path(config.run)
    device = pick_device(config.trainer)
    if (folder / "config.yaml").is_file():
        return _open_run(config, folder, device)
    if (folder / "config.json").is_file() and config.best:
        raise UserError(f"best=true: run={folder} is a Hugging Face folder, which holds one set of weights")
    if (folder / "config.json").is_file():
        return _open_hugging_face(config, folder, device)
    raise UserError(
        f"run={folder} is neither a run folder (with config.yaml) nor a Hugging Face folder (with config.json)"
    )


def _open_run(config: RunConfig, folder: Path, device: torch.device) -> Trained:
    kind: Kind = "best" if config.best else "step"
    checkpoint, passed_over = newest_complete(folder / "checkpoints", kind)
    for line in passed_over:
        log.warning("passed over a damaged checkpoint: %s", line)
    if checkpoint is None and kind == "best":
        raise UserError(
            f"best=true: run={folder} kept no weights of its best evaluation; train with trainer.keep_best=true, "
            "or leave out best=true for the last ones"
        )
    if checkpoint is None:
        raise UserError(f"run={folder} holds no complete checkpoint; train it first: python train.py")
    manifest = read_manifest(checkpoint)
    tokenizer = tokenizer_of(config)
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer that {folder} was trained with; "
            "its ids mean other text to this model: leave data.tokenizer as the run has it"
        )
    bare = dataclasses.replace(config.model, pretrained=False, compile=False, activation_checkpointing=False)
    model = build_model(
        bare,
        vocab_size=tokenizer.vocab_size,
        dtype=DTYPES[config.precision.weights],
        device=device,
        seed=config.seed,
        outputs=outputs_of(config.data),
    )
    if outputs_of(config.data) is not None:
        model.config.pad_token_id = tokenizer.pad_id
    strategy = Strategy.from_config(config.strategy, seed=config.seed, int8_group=config.precision.int8_group)
    strategy.prepare(model)
    model.load_state_dict(load_weights(checkpoint, manifest), strict=True)
    source = f"{folder} after {checkpoint_step(checkpoint):,} updates{', the best' if kind == 'best' else ''}"
    begin_id = tokenizer.begin_id if config.data.source == "chat" else None
    return Trained(model.eval(), tokenizer, strategy, source, device, begin_id)


def _open_hugging_face(config: RunConfig, folder: Path, device: torch.device) -> Trained:
    tokenizer = load_tokenizer(config.data.tokenizer or str(folder), config.data.chat_template)
    outputs = outputs_of(config.data)
    with user_errors(f"run={folder}"):
        model: PreTrainedModel = (
            auto_class(outputs)
            .from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,  # a pickle can run code
                trust_remote_code=False,
                local_files_only=True,
            )
            .to(device)
        )
    if outputs is not None and outputs != model.config.num_labels:
        raise UserError(
            f"run={folder}: gives {model.config.num_labels} numbers for a row, and data.task={config.data.task} needs "
            f"{outputs}; it was trained on another task"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer or folder} has {tokenizer.vocab_size} pieces, but the model in "
            f"{folder} has an embedding of {rows} rows; leave data.tokenizer out to use the one in the folder"
        )
    begin_id = model.config.bos_token_id if model.config.bos_token_id == tokenizer.bos_id else None
    return Trained(model.eval(), tokenizer, None, str(folder), device, begin_id)
