"""LLaMA of the published sizes and any Hugging Face causal language model: on meta first, then materialised once."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
)

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig, ModelConfig
from lowrank_train.config.seeding import seed_from_name
from lowrank_train.data.glue import TASKS
from lowrank_train.kernels.cross_entropy import linear_cross_entropy_sum
from lowrank_train.load_errors import allowed_weights, model_errors

log = logging.getLogger(__name__)

OFFSET_POSITIONS = ("roberta", "camembert", "mpnet")
"""In the names of model types whose first position has the number behind that of the pad token."""

AS_FORWARD = "call_as_forward"
"""The method, of a model whose parameters lie in shards, that calls a function with them gathered as forward() would:
for what uses the parts of a model without going through its own forward pass."""


def outputs_of(data: DataConfig) -> int | None:
    """How many numbers the model gives for a row of a GLUE task; None where it predicts the next token."""
    return TASKS[data.task].num_outputs if data.source == "glue" and data.task is not None else None


def auto_class(outputs: int | None) -> Any:
    """What of transformers builds and loads a model with so many outputs for a row; None: of the next token."""
    return AutoModelForCausalLM if outputs is None else AutoModelForSequenceClassification


def architecture(model: ModelConfig, *, vocab_size: int, outputs: int | None = None) -> Any:
    """The transformers configuration. UserError when the tokenizer has more pieces than the model has rows."""
    if model.kind == "hf":
        assert model.path is not None, "config checks demand model.path"
        with model_errors(model):
            config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    else:
        config = LlamaConfig(
            vocab_size=model.vocab_size or vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            max_position_embeddings=model.max_position_embeddings,
            rms_norm_eps=model.rms_norm_eps,
            initializer_range=model.initializer_range,
            tie_word_embeddings=model.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        )
    if vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} pieces, but model {model.name} has an embedding of {config.vocab_size} "
            "rows; choose another data.tokenizer, or a model with model.vocab_size of at least that"
        )
    config.use_cache = False
    if outputs is not None:
        config.num_labels = outputs
    return config


def meta_model(
    model: ModelConfig, *, vocab_size: int, dtype: torch.dtype = torch.float32, outputs: int | None = None
) -> PreTrainedModel:
    """The model without memory: every parameter a meta tensor of `dtype`."""
    config = architecture(model, vocab_size=vocab_size, outputs=outputs)
    with torch.device("meta"):
        built: PreTrainedModel = auto_class(outputs).from_config(
            config, dtype=dtype, attn_implementation=model.attention
        )
    return built


def build_model(
    model: ModelConfig,
    *,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    outputs: int | None = None,
) -> PreTrainedModel:
    """A model in training mode on `device`, in `dtype`; its initial numbers come from (seed, module name) alone.

    `outputs`: numbers for a whole row, from a head that is initialised anew where the folder has none of that size;
    None: the next token.
    """
    if model.kind == "hf" and model.pretrained and outputs is not None:
        built = _with_row_head(model, vocab_size, dtype, seed, outputs).to(device)
    elif model.kind == "hf" and model.pretrained:
        architecture(model, vocab_size=vocab_size)
        with model_errors(model), allowed_weights(model):
            built = AutoModelForCausalLM.from_pretrained(
                model.path,
                revision=model.revision,
                dtype=dtype,
                attn_implementation=model.attention,
                use_safetensors=None if model.allow_pickle else True,  # a pickle can run code
                trust_remote_code=False,
            ).to(device)
        built.config.use_cache = False
    else:
        built = meta_model(model, vocab_size=vocab_size, dtype=dtype, outputs=outputs)
        built.to_empty(device=device)
        built.tie_weights()
        initialize_(built, seed)
    if model.activation_checkpointing:
        built.activation_checkpointing_enable({"use_reentrant": False})
    if model.compile:
        parts = decoder_and_head(built)
        (parts[0] if parts else built).compile()
    built.train()
    return built


def _with_row_head(model: ModelConfig, vocab_size: int, dtype: torch.dtype, seed: int, outputs: int) -> PreTrainedModel:
    """A pre-trained body under a head of `outputs` numbers. UserError where the folder lacks a part of the body."""
    config, path = architecture(model, vocab_size=vocab_size, outputs=outputs), model.path
    with model_errors(model), allowed_weights(model):
        built, loaded = AutoModelForSequenceClassification.from_pretrained(
            model.path,
            config=config,
            revision=model.revision,
            dtype=dtype,
            attn_implementation=model.attention,
            use_safetensors=None if model.allow_pickle else True,  # a pickle can run code
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the head of another task, such as MNLI's three labels
            output_loading_info=True,
        )
    anew = {*loaded["missing_keys"], *(found[0] for found in loaded["mismatched_keys"])}
    body = [name for name in sorted(anew) if name.startswith(f"{built.base_model_prefix}.") and ".pooler." not in name]
    if body:
        raise UserError(
            f"model.path={model.path}: has no {body[0]} of the right shape, nor {len(body) - 1} other tensors of the "
            f"model's body; it is no whole {type(built).__name__}"
        )
    for name, found, needed in loaded["mismatched_keys"]:
        log.warning("%s: its %s is %s, of another task; drawn anew as %s", path, name, tuple(found), tuple(needed))
    initialize_(built, seed, {name.rpartition(".")[0] for name in anew})
    trained: PreTrainedModel = built
    return trained


def initialize_(model: PreTrainedModel, seed: int, only: set[str] | None = None) -> None:
    """Fill a model that was allocated empty: transformers' own rule, under a generator seeded module by module.

    `only`: names of the modules to fill; None: all.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, module in model.named_modules():
            if only is not None and name not in only:
                continue
            torch.manual_seed(seed_from_name(seed, name))
            # transformers marks initialised modules; one that was emptied since must be filled all the same
            module._is_hf_initialized = False
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor._is_hf_initialized = False
            model._init_weights(module)


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """The part that makes hidden states and the linear head on it, where the model is just these two."""
    head = getattr(model, "lm_head", None)
    decoder = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if isinstance(head, nn.Linear) and head.bias is None and decoder is not None and decoder is not model:
        return decoder, head
    return None


def causal_loss(model: nn.Module, batch: dict[str, Any], *, chunk_tokens: int) -> tuple[Tensor, int]:
    """Sum of -log p over the targets of a batch, and their number.

    `input_ids` and `labels` are (rows, positions), labels not shifted, -100 where there is no target. `document_ids`,
    where present, confine attention and positions to each document of a packed row. The loss is float32 or wider; with
    `chunk_tokens` above 0 the logits of only that many positions exist at a time.
    """
    inputs, labels = batch["input_ids"], batch["labels"][:, 1:]
    arguments: dict[str, Any] = {"input_ids": inputs, "use_cache": False}
    if "document_ids" in batch:
        arguments |= within_documents(batch["document_ids"])
    parts = decoder_and_head(model) if chunk_tokens > 0 and not has_output_scaling(model) else None
    targeted = labels != -100
    targets = labels[targeted]
    if parts is None:
        logits = model(**arguments).logits[:, :-1][targeted]
        loss = nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
        )
        return loss, len(targets)
    decoder, head = parts

    def in_chunks() -> Tensor:
        hidden = decoder(**arguments).last_hidden_state[:, :-1][targeted]
        return linear_cross_entropy_sum(hidden, head.weight, targets, chunk_positions=chunk_tokens)

    in_place_of_forward: Callable[[Callable[[], Tensor]], Tensor] | None = getattr(model, AS_FORWARD, None)
    return in_chunks() if in_place_of_forward is None else in_place_of_forward(in_chunks), len(targets)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: the layers of a decoder or encoder."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(block for block in child if any(True for _ in block.parameters()))
            else:
                look(child)

    look(model)
    return found


def common_to_blocks(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that several blocks of layers use."""
    found = Counter(param for block in blocks_of(model) for param in block.parameters())
    return [param for param, count in found.items() if count > 1]


def around_blocks(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are no single block's: outside of all, or common to several."""
    common = set(common_to_blocks(model))
    inside = {param for block in blocks_of(model) for param in block.parameters()} - common
    return [param for param in model.parameters() if param not in inside]


def within_documents(document_ids: Tensor) -> dict[str, Tensor]:
    """Attention mask (rows, 1, positions, positions) and positions that start anew with each document."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    position_ids = index - torch.where(starts, index, 0).cummax(1).values
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return {"attention_mask": same & (index[:, None] >= index), "position_ids": position_ids}


def check_rows(model: PreTrainedModel, choice: ModelConfig, data: DataConfig) -> None:
    """UserError where rows are longer than the model's positions reach, or where it cannot tell documents apart."""
    own, name = model.config, choice.path or choice.name
    positions = getattr(own, "max_position_embeddings", None)
    if positions is not None and any(kind in own.model_type for kind in OFFSET_POSITIONS):
        positions -= (getattr(own, "pad_token_id", None) or 0) + 1
    if positions is not None and 0 < positions < data.seq_len:
        raise UserError(
            f"data.seq_len={data.seq_len}: is above the {positions} positions of model.path={name}; use "
            f"data.seq_len={positions} or less"
        )
    if not data.mask_documents or data.packing == "pad":
        return
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"data.mask_documents=true: a {type(model).__name__} takes no positions, so that documents of one row "
            "cannot be told apart; use data.packing=pad"
        )
    if choice.attention.startswith("flash_attention"):
        raise UserError(
            f"model.attention={choice.attention}: takes no mask between the documents of a row; use "
            "model.attention=sdpa, or data.packing=pad"
        )


def has_output_scaling(model: nn.Module) -> bool:
    """Whether the head's output is changed before it is a logit (Gemma 2, Cohere, Granite, MiniCPM, ...)."""
    config = getattr(model, "config", None)
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap", "dim_model_base")
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in names)
