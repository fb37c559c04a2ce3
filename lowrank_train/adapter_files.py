"""An adapter as the package PEFT writes and reads it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.evaluate.loading import Trained
from lowrank_train.models import build_model, outputs_of
from lowrank_train.nn.peft import ADAPTER, Peft, mapping
from lowrank_train.nn.reparam import ReparamLinear, layers_of

WAY_OUT = "leave out adapter=true to export the whole model"


def write_adapter(config: RunConfig, trained: Trained, folder: Path) -> None:
    """What the run's layers hold beside the base model, and whole what else of it was trained, with the tokenizer.

    UserError where there is no base model to put it on, or PEFT has no such layers.
    """
    layers = layers_of(trained.model)
    weights = trained.strategy.weights if trained.strategy is not None else None
    if weights is None or trained.strategy is None or not layers:
        raise UserError(f"adapter=true: the model in run={config.run} has no adapters; {WAY_OUT}")
    if trained.strategy.merge is not None:
        raise UserError(
            f"adapter=true: strategy.merge has put the adapters into the base, which the files do not hold; {WAY_OUT}"
        )
    base = base_model(config, trained)
    matrices = {name: base.get_submodule(name).weight.detach() for name in layers}
    with _quiet():
        try:
            method, options = weights.as_peft()
            tensors = {name: layer.adapter_tensors(matrices[name]) for name, layer in layers.items()}
            choice = weights if isinstance(weights, Peft) else Peft(type=method, options=options)
            made = choice.peft_config(list(layers), config.seed)
        except ValueError as error:
            raise UserError(f"adapter=true: {error}; {WAY_OUT}") from None
        made.task_type = "CAUSAL_LM" if outputs_of(config.data) is None else "SEQ_CLS"
        whole = sorted(set(_trained_whole(trained.model, base, list(layers))))
        made.modules_to_save = list(whole) or None  # PEFT adds the usual names of heads
        biases = _trained_biases(layers, base)
        if biases and not hasattr(made, "bias"):
            raise UserError(f"adapter=true: PEFT's {method} cannot hold the biases, which were trained too; {WAY_OUT}")
        if biases:
            made.bias = "all"
        made.base_model_name_or_path = config.model.path
        made.revision = config.model.revision
        peft: Any = importlib.import_module("peft")
        with torch.random.fork_rng(devices=[]):
            model: Any = peft.get_peft_model(base, made, adapter_name=ADAPTER, autocast_adapter_dtype=False)
        _fill(model, trained.model, tensors, whole)
        for name, bias in biases.items():
            model.base_model.model.get_submodule(name).base_layer.bias.data.copy_(bias)
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    trained.tokenizer.save(folder)


def read_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`base` with the adapter in `folder` on it, in float32 and evaluation mode, as PEFT reads it."""
    mapping()
    peft: Any = importlib.import_module("peft")
    with _quiet():
        model: PreTrainedModel = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    return model.float().eval()


def base_model(config: RunConfig, trained: Trained) -> PreTrainedModel:
    """The model that the run began with, on the CPU, in the dtype of its weights; UserError where it has no name."""
    if config.model.kind != "hf" or not config.model.pretrained:
        raise UserError(
            f"adapter=true: the run began from random weights, and an adapter needs a base model that can be loaded; "
            f"{WAY_OUT}"
        )
    base = build_model(
        dataclasses.replace(config.model, compile=False, activation_checkpointing=False),
        vocab_size=trained.tokenizer.vocab_size,
        dtype=next(trained.model.parameters()).dtype,
        device="cpu",
        seed=config.seed,
        outputs=outputs_of(config.data),
    ).eval()
    base.config.pad_token_id = trained.model.config.pad_token_id
    if trained.strategy is not None and trained.strategy.weights is not None:
        trained.strategy.weights.keep_base_(base, list(layers_of(trained.model)))
    return base


def _trained_whole(model: nn.Module, base: nn.Module, layers: list[str]) -> Iterator[str]:
    """The modules outside of the layers that hold other numbers than the base model's; a head as one."""
    before = dict(base.named_parameters(remove_duplicate=False))
    for name, param in model.named_parameters(remove_duplicate=False):
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if not inside and not torch.equal(param.detach().cpu(), before[name]):
            top = name.partition(".")[0]
            holds_layers = any(layer.startswith(f"{top}.") for layer in layers)
            yield name.rpartition(".")[0] if holds_layers else top


def _trained_biases(layers: dict[str, ReparamLinear], base: nn.Module) -> dict[str, Tensor]:
    """Layer -> its bias, where it is another than the base model's."""
    biases = {name: layer.bias.detach().cpu() for name, layer in layers.items() if layer.bias is not None}
    before = dict(base.named_parameters())
    return {name: bias for name, bias in biases.items() if not torch.equal(bias, before[f"{name}.bias"])}


def _fill(model: Any, trained: nn.Module, tensors: dict[str, Any], whole: list[str]) -> None:
    """Put the run's numbers into PEFT's model."""
    inner: nn.Module = model.base_model.model
    for name, own in tensors.items():
        found = inner.get_submodule(name).load_state_dict(dict(own), strict=False)
        left = [key for key in found.missing_keys if not key.startswith("base_layer.")]
        if left or found.unexpected_keys:
            raise UserError(f"adapter=true: PEFT's layer {name} has not what ours has: {left + found.unexpected_keys}")
    for name in whole:
        state: dict[str, Tensor] = trained.get_submodule(name).state_dict()
        saved: Any = inner.get_submodule(name)
        saved.modules_to_save[ADAPTER].load_state_dict(state, strict=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings of a base that an init changes or of heads that are saved: what counts is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
