"""`lowrank export`: a plain Hugging Face folder or PEFT's adapter, proven by reloading it and comparing logits."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from lowrank_train.adapter_files import base_model, read_adapter, write_adapter
from lowrank_train.config.errors import EXIT_FAILURE, RunStopped, UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.data import Tokenizer, validation_batches
from lowrank_train.data.glue import encoded_rows, read_split, splits_of, task_of
from lowrank_train.evaluate.loading import Trained, open_trained
from lowrank_train.models import auto_class, build_model, outputs_of
from lowrank_train.nn.reparam import layers_of

LARGEST_LOGIT_DIFFERENCE = 1e-4
"""Between the trained model and what was written, and between that and what is read back. A model of reparametrised
layers is compared with its folded form, whose matrices are then in float32, by arithmetic in float64: where a layer
takes from W0 what its factors add (PiSSA, LoLDU), float32 alone gives logits of 20 errors of 1e-3. What is read back
holds the numbers that were written, so that there it means equality, in any dtype."""

PROBE_TEXTS = (
    "It was the best of times, it was the worst of times.",
    "To be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer",
    "In 1905, the temperature was -3.5 °C; naïve readers paid 20 € for “quoted” text.",
)


def export(config: RunConfig) -> int:
    """Write `run=` to `out=`; RunStopped, with nothing written, when the folder does not give the same answers."""
    if not config.out:
        raise UserError("task export needs out=FOLDER, the folder to write")
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out} exists and is not empty; choose another folder or remove it")
    trained = open_trained(config)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write, check = (write_adapter, compare_adapter) if config.adapter else (write_hugging_face, compare)
    try:
        write(config, trained, partial)
        difference, positions = check(config, trained, partial)
    except BaseException:  # whatever went wrong, Ctrl-C included: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()  # empty, as checked above
    partial.rename(out)
    print(f"{trained.source} -> {out}")
    reader = "PeftModel" if config.adapter else auto_class(outputs_of(config.data)).__name__
    print(
        f"reloaded with {reader} and AutoTokenizer: logits at {positions:,} positions of real text differ "
        f"by at most {difference:.1e}, token ids are equal"
    )
    return 0


def write_hugging_face(config: RunConfig, trained: Trained, folder: Path) -> None:
    """Weights as plain dense matrices, config.json, generation_config.json and the tokenizer's files."""
    plain = dense_model(config, trained)
    tokenizer = trained.tokenizer
    if config.data.source == "glue":
        task = task_of(config.data)
        plain.config.id2label = dict(enumerate(task.labels or ("score",)))
        plain.config.label2id = {label: number for number, label in plain.config.id2label.items()}
        plain.save_pretrained(folder, safe_serialization=True)
        tokenizer.save(folder)
        return
    # No begin mark, even where the tokenizer has one: our documents end in a mark and begin without, so that the model
    # has never seen it.
    begin_id = trained.begin_id
    marks = {"bos_token_id": begin_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    for name, mark in marks.items():
        setattr(plain.config, name, mark)
    plain.config.use_cache = True
    plain.generation_config = GenerationConfig(**marks)
    plain.save_pretrained(folder, safe_serialization=True)
    tokenizer.save(folder)


def dense_model(config: RunConfig, trained: Trained) -> PreTrainedModel:
    """The architecture without its memory strategy, filled with what the strategy says its matrices stand for."""
    if trained.strategy is None:
        return trained.model
    plain = build_model(
        dataclasses.replace(config.model, pretrained=False, compile=False, activation_checkpointing=False),
        vocab_size=trained.tokenizer.vocab_size,
        dtype=next(trained.model.parameters()).dtype,
        device="cpu",
        seed=config.seed,
        outputs=outputs_of(config.data),
    )
    plain.config.pad_token_id = trained.model.config.pad_token_id
    # In float64, since what W0 and the factors take from each other (PiSSA, LoLDU) is lost in float32.
    plain.load_state_dict(trained.strategy.dense_state_dict(trained.model, torch.float64), strict=True)
    return plain.eval()


def compare(config: RunConfig, trained: Trained, folder: Path) -> tuple[float, int]:
    """Largest difference of logits on real text and the number of positions compared.

    RunStopped when it is above LARGEST_LOGIT_DIFFERENCE or when a text gets other ids.
    """
    reloaded = (
        auto_class(outputs_of(config.data))
        .from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True)
        .eval()
    )
    _compare_ids(trained.tokenizer, folder)
    rows = _probe_rows(config, trained.tokenizer)
    trained.model.to("cpu")
    if not layers_of(trained.model):
        return _largest_difference(trained.model, reloaded, rows), sum(ids.numel() for ids in rows)
    written = _largest_difference(dense_model(config, trained), reloaded, rows)
    trained.model.float()
    folded = _largest_difference(trained.model, dense_model(config, trained), rows, in_float64=True)
    return max(written, folded), sum(ids.numel() for ids in rows)


def compare_adapter(config: RunConfig, trained: Trained, folder: Path) -> tuple[float, int]:
    """As `compare`, of the base model with the adapter in `folder` on it, both in float64."""
    _compare_ids(trained.tokenizer, folder)
    rows = _probe_rows(config, trained.tokenizer)
    trained.model.to("cpu")
    reloaded = read_adapter(base_model(config, trained), folder)
    difference = _largest_difference(trained.model.float(), reloaded, rows, in_float64=True)
    return difference, sum(ids.numel() for ids in rows)


def _largest_difference(
    model: PreTrainedModel, other: PreTrainedModel, rows: list[torch.Tensor], *, in_float64: bool = False
) -> float:
    """Of two models' logits. RunStopped when it is too large."""
    largest, arithmetic = 0.0, float64 if in_float64 else nullcontext
    with torch.no_grad(), arithmetic(model), arithmetic(other):
        for ids in rows:
            expected = model(input_ids=ids, use_cache=False).logits.double()
            found = other(input_ids=ids, use_cache=False).logits.double()
            if found.shape != expected.shape:
                raise RunStopped(f"export failed: logits of shape {found.shape}, not {expected.shape}", EXIT_FAILURE)
            difference = float((found - expected).abs().max())
            if not difference <= LARGEST_LOGIT_DIFFERENCE:  # not (a <= b): NaN fails too
                raise RunStopped(
                    f"export failed: the exported model's logits differ by {difference:.3g} from the trained model's "
                    f"(at most {LARGEST_LOGIT_DIFFERENCE:.0e} is right); nothing was written",
                    EXIT_FAILURE,
                )
            largest = max(largest, difference)
    return largest


@contextmanager
def float64(model: nn.Module) -> Iterator[None]:
    """Within it `model` computes in float64 with the numbers it has. One block of it at a time is held so: all of a
    model of 7B parameters would be 56 GB."""
    narrow: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(module: nn.Module, _: object) -> None:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                narrow.append((tensor, tensor.data))
                tensor.data = tensor.data.double()

    def restore(*_: object) -> None:
        while narrow:
            tensor, data = narrow.pop()
            tensor.data = data

    hooks = []
    for part in _parts(model):
        hooks += [part.register_forward_pre_hook(widen), part.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, and the modules before and after them."""
    if isinstance(module, nn.ModuleList):
        yield from module
    elif any(isinstance(inside, nn.ModuleList) for inside in module.modules()):
        for child in module.children():
            yield from _parts(child)
    else:
        yield module


def _compare_ids(tokenizer: Tokenizer, folder: Path) -> None:
    reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for text in PROBE_TEXTS:
        expected = tokenizer.encode([text])[0]
        found = reloaded(text, add_special_tokens=False)["input_ids"]
        if list(found) != list(expected):
            raise RunStopped(f"export failed: the reloaded tokenizer reads {text!r} differently", EXIT_FAILURE)


def _probe_rows(config: RunConfig, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Rows of token ids, shape (1, positions): the first validation rows where the run's data is at hand, and the
    probe texts."""
    rows = [torch.tensor([tokenizer.encode([text])[0]]) for text in PROBE_TEXTS]
    try:
        if config.data.source == "glue":
            first = read_split(config.data, splits_of(config.data)[0])[:4]
            encoded = encoded_rows(config.data, first, tokenizer, "validation")
            return [*rows, *(encoded.batch([row])["input_ids"] for row in range(len(first)))]
        batches = iter(validation_batches(config.data, tokenizer, batch_size=1, rank=0, world_size=1))
        rows += [batch["input_ids"] for batch, _ in zip(batches, range(4), strict=False)]
    except (UserError, OSError):  # the data may be on another machine than the run
        pass
    return rows
