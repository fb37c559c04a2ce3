"""The least and the most that single numbers of a configuration may be."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowrank_train.config.schema import RunConfig
from lowrank_train.config.strategy_checks import value_of

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


def bound_faults(config: RunConfig) -> Iterator[str]:
    """A sentence for each number that lies outside."""
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
