"""Training on a card: recipes under a cap of memory, and the peak that is planned beside the one that is measured."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from lowrank_train.config import compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory.counting import flops_per_position
from lowrank_train.memory.devices import peak_bf16_flops
from lowrank_train.memory.fake_run import FIRST, PLAIN
from lowrank_train.memory.plan import planned
from lowrank_train.models import build_model, causal_loss
from lowrank_train.train.run import DTYPES, build_optimizer, micro_batches_of, prepare_strategy

CAPS = {"galore_7b_4090": 24e9, "q_galore_7b_16gb": 16e9}  # recipe -> bytes that torch may take
UPDATES = 20
VOCABULARY = 32000
STRATEGIES = ("full", "galore", "galore_8bit", "q_galore", "fira", "frugal", "apollo", "lora", "sltrain", "sst")
MODELS = ("llama_60m", "llama_130m", "llama_350m")


def trained(config: RunConfig, device: torch.device, updates: int) -> dict[str, Any]:
    """Build what the configuration names and train it on random tokens: losses, seconds of each update, FLOPs."""
    vocab_size = config.model.vocab_size or VOCABULARY
    dtype = DTYPES[config.precision.weights]
    model = build_model(config.model, vocab_size=vocab_size, dtype=dtype, device=device, seed=config.seed)
    strategy = prepare_strategy(config, model)
    optimizer = build_optimizer(config, strategy, model)
    micro_batches, shape = micro_batches_of(config.trainer), (config.trainer.batch_size, config.data.seq_len)
    generator = torch.Generator().manual_seed(config.seed)
    mixed = config.precision.compute == "bf16-mixed"

    def passes(first: bool) -> Tensor:
        tokens = torch.randint(vocab_size, shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            batch = {"input_ids": tokens, "labels": tokens}
            total, targets = causal_loss(model, batch, chunk_tokens=config.model.loss_chunk_tokens)
        if first:
            optimizer.zero_grad()
        loss = total / targets / micro_batches
        loss.backward()
        return loss.detach()

    losses, seconds = [], []
    for update in range(1, updates + 1):
        started = time.perf_counter()
        before = [passes(first=number == 0) for number in range(micro_batches - 1)]
        losses.append(optimizer.step(lambda last=not before: passes(first=last)) + sum(before))
        strategy.run_events(update, model, optimizer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {
        "losses": [float(loss) for loss in losses],
        "seconds": seconds,
        "positions": shape[0] * shape[1] * micro_batches,
        "flops_per_position": flops_per_position(model, shape[1]),
    }


def on_card(config: RunConfig, updates: int) -> dict[str, Any]:
    """`trained`, with the peak of memory; `fits` is false, and nothing else is there, where memory ran out."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run = trained(config, torch.device("cuda"), updates)
    except torch.OutOfMemoryError as error:
        return {"fits": False, "error": str(error).splitlines()[0]}
    # The first update makes the bases and compiles the kernels.
    tokens_per_sec = run["positions"] / statistics.median(run["seconds"][1:])
    peak_flops = peak_bf16_flops(torch.cuda.get_device_name())
    return {
        "fits": True,
        "updates": updates,
        "positions_per_update": run["positions"],
        "tokens_per_sec": round(tokens_per_sec, 1),
        "mfu": None if peak_flops is None else round(tokens_per_sec * run["flops_per_position"] / peak_flops, 4),
        "first_update_sec": round(run["seconds"][0], 2),
        "update_sec": round(statistics.median(run["seconds"][1:]), 3),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "first_loss": round(run["losses"][0], 4),
        "last_loss": round(run["losses"][-1], 4),
    }


def recipes_under_caps() -> list[dict[str, Any]]:
    """The recipes for small cards, torch being kept from taking more than such a card has."""
    rows = []
    total = torch.cuda.get_device_properties(0).total_memory
    for recipe, cap in CAPS.items():
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        rows.append({"recipe": recipe, "cap_bytes": int(cap)} | on_card(recipe_config(recipe), UPDATES))
        torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def recipe_config(recipe: str) -> RunConfig:
    """The recipe as it stands; its data is not read."""
    return compose([f"recipe={recipe}", "task=plan"])


def small_config(strategy: str, model: str) -> RunConfig:
    """A strategy with its own defaults on a model, in bfloat16."""
    choices = [f"strategy={strategy}", f"model={model}", "precision=bf16", "recipe=null", "task=plan"]
    return compose([*choices, "trainer.batch_size=16", "data.seq_len=256", f"model.vocab_size={VOCABULARY}"])


def plan_against_measured() -> list[dict[str, Any]]:
    """Peaks of the first two updates: of the plan, which no card is needed for, and of torch's allocator."""
    rows = []
    for model in MODELS:
        for strategy in STRATEGIES:
            config = small_config(strategy, model)
            row = {"model": model, "strategy": strategy, "planned_bytes": planned_peak(config)} | on_card(config, 2)
            if row["fits"]:
                row["measured_to_planned"] = round(row["allocated_bytes"] / row["planned_bytes"], 4)
            rows.append(row)
    return rows


def planned_peak(config: RunConfig) -> int:
    """Of the updates alone: no evaluation, checkpoint or event is run here."""
    phases = planned(config).phases
    return max(value for name, value in phases.items() if name.partition(":")[0] in (FIRST, PLAIN))
