"""`lowrank generate`: text sampled from a run or an exported folder, the same for the same seed."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import GenerateConfig, RunConfig
from lowrank_train.data import Tokenizer
from lowrank_train.evaluate.loading import open_trained


def generate(config: RunConfig) -> int:
    """Sample `generate.num_samples` texts and print them, separated by a line of dashes."""
    trained = open_trained(config)
    texts = sample(trained.model, trained.tokenizer, config.generate, seed=config.seed, begin_id=trained.begin_id)
    print("\n----\n".join(texts))
    return 0


def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    generate: GenerateConfig,
    *,
    seed: int,
    begin_id: int | None = None,
) -> list[str]:
    """Texts that continue `generate.prompt`, prompt included; the callers' random generators are left as they were.

    `begin_id` stands before every prompt, for models that were trained with such a mark. Without it an empty prompt
    starts where documents start: after the end mark of the one before. UserError when the tokenizer has none, or when
    the prompt leaves no room.
    """
    device = next(model.parameters()).device
    marks = {mark for mark in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if mark is not None}
    start = begin_id if begin_id is not None or generate.prompt else tokenizer.eos_id
    ids = [start] if start is not None else []
    ids += tokenizer.encode([generate.prompt])[0] if generate.prompt else []
    if not ids:
        raise UserError("generate.prompt is empty and the tokenizer has no mark to start from; give generate.prompt")
    room = getattr(model.config, "max_position_embeddings", None)
    new_tokens = generate.max_new_tokens if room is None else min(generate.max_new_tokens, room - len(ids))
    if new_tokens < 1:
        raise UserError(f"generate.prompt has {len(ids)} tokens, but the model knows only {room} positions; shorten it")
    sampled = generate.temperature > 0
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sampled,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        **({"temperature": generate.temperature, "top_p": generate.top_p} if sampled else {}),
    )
    prompt = torch.tensor([ids] * generate.num_samples, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    finally:
        model.train(was_training)
    return [tokenizer.decode([token for token in row if token not in marks]) for row in output.tolist()]
