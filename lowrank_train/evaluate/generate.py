"""`lowrank generate`: text sampled from a run or an exported folder, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import GenerateConfig, RunConfig
from lowrank_train.data import Tokenizer
from lowrank_train.data.chat import ChatTemplate
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
    starts where documents start: after the end mark of the one before. With `generate.chat` the prompt is a user's
    message, and the texts are the replies alone. UserError when the tokenizer has no mark to start from or no chat
    template, or when the prompt leaves no room.
    """
    ids = chat_ids(tokenizer, generate.prompt) if generate.chat else text_ids(tokenizer, generate.prompt, begin_id)
    room = getattr(model.config, "max_position_embeddings", None)
    limit = generate.max_new_tokens if room is None else min(generate.max_new_tokens, room - len(ids))
    if limit < 1:
        raise UserError(f"generate.prompt has {len(ids)} tokens, but the model knows only {room} positions; shorten it")
    new = new_tokens(
        model,
        tokenizer,
        [ids] * generate.num_samples,
        limit=limit,
        temperature=generate.temperature,
        top_p=generate.top_p,
        seed=seed,
    )
    marks = {mark for mark in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if mark is not None}
    asked = [] if generate.chat else ids
    return [tokenizer.decode([token for token in [*asked, *row] if token not in marks]) for row in new]


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A user's message, and the place where the reply begins."""
    if not prompt:
        raise UserError("generate.prompt is empty, and a model of chats answers to something; give generate.prompt")
    return ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": prompt}])


def text_ids(tokenizer: Tokenizer, prompt: str, begin_id: int | None) -> list[int]:
    """A text to go on from."""
    start = begin_id if begin_id is not None or prompt else tokenizer.eos_id
    ids = [start] if start is not None else []
    ids += tokenizer.encode([prompt])[0] if prompt else []
    if not ids:
        raise UserError("generate.prompt is empty and the tokenizer has no mark to start from; give generate.prompt")
    return ids


def new_tokens(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """At most `limit` ids after each of `prompts`, which are equally long; the most probable ones at temperature 0.

    The end mark, where it comes, is the last id or has pads behind it.
    """
    sampled = temperature > 0
    settings = GenerationConfig(
        max_new_tokens=limit,
        do_sample=sampled,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        **({"temperature": temperature, "top_p": top_p} if sampled else {}),
    )
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    finally:
        model.train(was_training)
    found: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return found
