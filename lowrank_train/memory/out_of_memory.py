"""A run that died of memory: the phase it was in, what it held, and what needs less by how much."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.cards import GB, Card
from lowrank_train.memory.changes import axes
from lowrank_train.memory.counting import bytes_of, weights_by_kind
from lowrank_train.memory.devices import device_name, memory_now_bytes
from lowrank_train.memory.fitting import Search, written
from lowrank_train.memory.host import main_memory_bytes
from lowrank_train.memory.plan_table import gb, words
from lowrank_train.optim.optimizer import TransformOptimizer

SIGNS = (
    "can't allocate memory",  # torch on the CPU of Linux and macOS
    "not enough memory",  # the same on Windows
    "CUDA error: out of memory",  # the driver itself
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
"""Parts of a RuntimeError's message where torch raises no class of its own."""

PHASES = {
    "train/run.py build_module": "building model and optimizer",
    "train/module.py training_step": "forward",
    "autograd/graph.py _engine_run_backward": "backward",  # torch's; what checkpointing recomputes happens in it
    "optim/optimizer.py _take_step": "step",
    "subspace/base.py refresh": "moving bases",
    "subspace/dense.py refresh": "moving bases",
    "subspace/online.py refresh": "moving bases",
    "lowrank_train/strategy.py run_events": "event",
    "train/recorder.py _evaluate_into": "evaluation",
    "train/saver.py _save": "checkpoint",
    "train/summary.py summarize": "summary",
    "train/summary.py of_all_devices": "summary",
}
"""Where the program is: the end of a file's path, and a function in it."""
SUGGESTIONS = 3


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or of main memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in SIGNS)


def phase_of(error: BaseException) -> str:
    """The innermost phase that its traceback went through."""
    found = "training"
    for frame in traceback.extract_tb(error.__traceback__):
        found = PHASES.get(f"{'/'.join(Path(frame.filename).parts[-2:])} {frame.name}", found)
    return found


def obituary(config: RunConfig, model: PreTrainedModel | None, optimizer: TransformOptimizer | None) -> str:
    """What was held when the memory ended, and the cheapest changes that need less, planned for this configuration.

    `model` and `optimizer` are those of the run, as far as there are any yet.
    """
    held = [] if model is None or optimizer is None else [held_line(model, optimizer)]
    return "\n".join([*held, *suggestions(config, model)])


def held_line(model: PreTrainedModel, optimizer: TransformOptimizer) -> str:
    """By kind, the largest first: counted weights, gradients and state, and what else the process has in use."""
    device = next(model.parameters()).device
    held = weights_by_kind(model)
    held["gradients"] = bytes_of(param.grad for param in model.parameters() if param.grad is not None)
    held |= {f"state.{kind}": count for kind, count in optimizer.state_bytes().items()}
    rest = memory_now_bytes(device) - sum(held.values())
    parts = [f"{words(kind)} {size(count)}" for kind, count in sorted(held.items(), key=lambda item: -item[1]) if count]
    what = "activations, temporaries" if device.type == "cuda" else "activations, temporaries, the program itself"
    return f"Held on {device_name(device)}: {', '.join(parts)}; the rest ({what}) {size(max(0, rest))}."


def suggestions(config: RunConfig, model: PreTrainedModel | None) -> Iterator[str]:
    """The first changes in the order of their price that save something, with their bytes."""
    try:
        search = Search(config, _whole_machine(model))
        saving = search.savings(SUGGESTIONS)
    except Exception as error:  # noqa: BLE001  (this is said while a run dies: what it died of must reach the user)
        yield f"What needs less, cheapest first (it could not be planned by how much: {error}):"
        changes = [change for axis in axes(config) for change in axis.changes[:1]]
        yield from (f"  {written(change.words)}: {change.price}" for change in changes[:SUGGESTIONS])
        return
    yield f"The plan has a peak of {size(search.found.as_it_is.peak_bytes)}. What needs less, cheapest first:"
    for tried in saving:
        yield f"  {written(tried.words)}: {size(tried.saved_bytes)} less; {tried.price}"
    if not saving:
        yield "  another strategy or a smaller model: lowrank plan strategy=all"
    yield "What fits a card: lowrank plan ... card=NAME fit=true"


def size(count: int) -> str:
    """In GB of 10^9 bytes, small ones in MB."""
    return gb(count) if count >= GB // 10 else f"{count / 10**6:.2f} MB"


def _whole_machine(model: PreTrainedModel | None) -> Card:
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    if device.type == "cuda":
        return Card(device_name(device), torch.cuda.get_device_properties(device).total_memory, device_name(device))
    return Card("main memory", main_memory_bytes()[0], None)
