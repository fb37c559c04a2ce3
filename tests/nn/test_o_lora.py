"""O-LoRA: earlier adapters are part of the matrix, and the new one is pulled away from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_train.config.errors import UserError
from lowrank_train.nn.o_lora import OLoRA, OLoRALinear
from lowrank_train.nn.reparam import Origin
from lowrank_train.strategy import Strategy
from tests.nn.methods import Method, Toy, train, weights


def adapter(folder: Path, seed: int, rank: int, alpha: float, **more: object) -> Path:
    """A LoRA for the three matrices of Toy, as PEFT writes one."""
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in {"tall": (20, 12), "square": (20, 20), "wide": (8, 20)}.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=drawn)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=drawn) / 10
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **more}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def o_lora(**options: object) -> Strategy:
    return Method("o_lora", weights("o_lora.OLoRA", rank=2, **options)).strategy()


@pytest.fixture
def earlier(tmp_path: Path) -> list[str]:
    return [str(adapter(tmp_path / "one", 1, 2, 4.0)), str(adapter(tmp_path / "two", 2, 3, 6.0, use_rslora=True))]


def test_begins_with_the_earlier_adapters(earlier: list[str]) -> None:
    """1e-6: the products in float64, added to a float32 matrix."""
    plain = Toy()
    for name in ("tall", "square", "wide"):
        linear = plain.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        expected, rows = linear.weight.detach().double(), []
        for folder, scale in zip(earlier, (2.0, 6.0 / 3**0.5), strict=True):
            tensors = load_file(f"{folder}/adapter_model.safetensors")
            first, second = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            expected = expected + scale * second.double() @ first.double()
            rows.append(first)
        layer = OLoRA(rank=2, previous=earlier).layer(linear, Origin(name, 3))
        assert isinstance(layer, OLoRALinear)
        torch.testing.assert_close(layer.dense_weight().double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(layer.previous_A, torch.cat(rows))


def test_the_pull_is_the_gradient_of_the_penalty(earlier: list[str]) -> None:
    layer = OLoRA(rank=2, previous=earlier).layer(Toy().square, Origin("square", 3))
    assert isinstance(layer, OLoRALinear)
    leaf = layer.A.detach().clone().requires_grad_()
    (leaf @ layer.previous_A.T).abs().sum().backward()
    assert leaf.grad is not None
    expected = leaf.detach() - 0.1 * leaf.grad
    layer.pull_(0.1)
    torch.testing.assert_close(layer.A.detach(), expected, atol=1e-6, rtol=0)


def test_training_turns_away_from_the_earlier_tasks(earlier: list[str]) -> None:
    """The sum of |A A_i^T| ends far below that of plain LoRA on the same data."""
    overlap = {}
    for strength in (0.0, 0.5):
        model, strategy = Toy(), o_lora(previous=earlier, orthogonal=strength)
        strategy.prepare(model)
        train(model, strategy, strategy.optimizer(model, lr=2e-3), range(1, 80))
        layer = model.square
        assert isinstance(layer, OLoRALinear)
        overlap[strength] = (layer.A @ layer.previous_A.T).abs().sum().item()
    assert overlap[0.5] < overlap[0.0] / 3


def test_what_is_no_adapter_is_refused(tmp_path: Path, earlier: list[str]) -> None:
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        OLoRA(previous=[str(tmp_path / "none")])
    other = adapter(tmp_path / "other", 1, 2, 4.0)
    (other / "adapter_config.json").write_text('{"peft_type": "VERA"}', encoding="utf-8")
    with pytest.raises(ValueError, match="an adapter of type VERA, not a LORA"):
        OLoRA(previous=[str(other)])
    with pytest.raises(UserError, match="has no LoRA for elsewhere"):
        OLoRA(previous=earlier).layer(nn.Linear(20, 20), Origin("elsewhere", 3))
    with pytest.raises(ValueError, match="orthogonal is -1"):
        OLoRA(orthogonal=-1)
