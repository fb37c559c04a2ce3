"""AdaLoRA over PEFT's layers: ranks allocated as PEFT allocates them, and its regulariser in the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lowrank_train.config import compose
from lowrank_train.models import build_model
from lowrank_train.nn.peft import AdaLoRALinear
from lowrank_train.nn.reparam import layers_of
from tests.nn.test_peft import SIZES, strategy_of

pytest.importorskip("peft", reason="the extra `peft` is not installed")


def their_adalora(options: dict[str, Any]) -> Iterator[list[Tensor]]:
    """PEFT's own loop of AdaLoRA, its orthogonal regulariser left out; the tensors after each of 8 updates."""
    from peft import AdaLoraConfig, get_peft_model

    made = get_peft_model(llama(), AdaLoraConfig(target_modules=["q_proj", "up_proj"], **options))
    for name, param in made.named_parameters():
        param.requires_grad_(param.requires_grad and "ranknum" not in name)  # trained by an oversight, and not saved
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    start(made)
    for step in range(1, 9):
        loss_of(made.base_model.model, step).backward()  # type: ignore[arg-type]
        optimizer.step()
        made.base_model.update_and_allocate(step)  # type: ignore[operator]
        optimizer.zero_grad()
        yield [param.detach().clone() for name, param in sorted(made.named_parameters()) if ".lora_" in name]


def llama() -> LlamaForCausalLM:
    model: LlamaForCausalLM = build_model(
        compose([*SIZES, "recipe=null"]).model, vocab_size=40, dtype=torch.float64, device="cpu", seed=1
    )
    return model


def start(model: torch.nn.Module) -> None:
    """The same numbers in every adapter, lambda included, by the order of their names."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, param in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n):
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) / 5)


def loss_of(model: torch.nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


@pytest.mark.parametrize("delta", [1, 3])
def test_adalora_allocates_as_peft_does(delta: int) -> None:
    """Eight updates, budgets falling from 4 to 2 a layer; 1e-9 in float64, sums in other orders."""
    options = {
        "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": delta, "total_step": 8, "orth_reg_weight": 0.0,
    }  # fmt: skip
    model = llama()
    strategy = strategy_of("ADALORA", {**options, "modules": ["*.q_proj", "*.up_proj"]})
    strategy.prepare(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    start(model)
    masked = []
    for step, theirs in enumerate(their_adalora(options), 1):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.run_events(step, model, optimizer)
        ours = [param.detach() for name, param in sorted(model.named_parameters()) if ".lora_" in name]
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, atol=1e-9, rtol=0)
        masked.append(sum(int((~layer.kept).sum()) for layer in map(ada, layers_of(model).values())))
    assert masked[0] == 0 and masked[-1] == 8, "of 4 layers of 4 triplets, 2 each are left"


def ada(layer: object) -> AdaLoRALinear:
    assert isinstance(layer, AdaLoRALinear)
    return layer


def test_the_regulariser_of_adalora_joins_the_gradient_once() -> None:
    """Against autograd on PEFT's formula, over two micro-batches; 1e-10 in float64."""
    weight, ends = 0.3, []
    for ours in (True, False):
        model = llama()
        options = {"init_r": 4, "target_r": 2, "total_step": 8, "orth_reg_weight": weight if ours else 0.0}
        strategy = strategy_of("ADALORA", {**options, "modules": ["*.q_proj", "*.up_proj"]})
        strategy.prepare(model)
        start(model)
        for micro_batch in (1, 2):
            loss_of(model, micro_batch).backward()
        factors = [p for n, p in sorted(model.named_parameters()) if "lora_A" in n or "lora_B" in n]
        if not ours:
            parts = []
            for factor in factors:
                square = factor @ factor.T if factor.shape[0] == 4 else factor.T @ factor
                parts.append((square - torch.eye(4, dtype=torch.float64)).norm())
            (weight * torch.stack(parts).mean()).backward()
        ends.append([factor.grad for factor in factors])
    for own, other in zip(*ends, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=0)
