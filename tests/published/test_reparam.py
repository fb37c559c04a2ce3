"""`lowrank_train.reparametrise`: layers swapped in anybody's own model and loop, by the names of published code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.nn import LoRALinear, SLTrainLinear
from lowrank_train.nn.merge import Merge
from lowrank_train.nn.reparam import layers_of
from lowrank_train.published.reparam import CHOICES


class Block(nn.Module):
    """Named as transformers name their parts; the head is a linear layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(16, 16), "v_proj": nn.Linear(16, 16)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(16, 32), "down_proj": nn.Linear(32, 16)})
        self.lm_head = nn.Linear(16, 5)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn["v_proj"](self.self_attn["q_proj"](x).tanh())
        logits: Tensor = self.lm_head(x + self.mlp["down_proj"](self.mlp["up_proj"](x).relu()))
        return logits


SMALL: dict[str, dict[str, Any]] = {
    "loha": {"rank": 2}, "fedpara": {"rank": 2}, "block_dense": {"rank": 4}, "dlrt": {"rank": 4}, "slope": {},
    "trp": {}, "block_shuffle": {}, "cuttlefish": {}, "maestro": {}, "lte": {"rank": 4, "alpha": 4.0},
    "int8": {"group": 64}, "peft": {"type": "LORA", "r": 4}, "lamda": {"rank": 4, "stages": 2, "freeze_steps": 20},
}  # fmt: skip
"""What is not simply rank=4."""


def block() -> Block:
    torch.manual_seed(0)
    return Block().double()


@pytest.mark.parametrize("method", CHOICES)
def test_every_method_trains_in_ones_own_loop_and_folds_back(method: str) -> None:
    """The plain model then gives the same outputs; 1e-10 in float64."""
    model, plain = block(), block()
    strategy = lowrank_train.reparametrise(model, method, **SMALL.get(method, {"rank": 4}))
    assert set(layers_of(model)) == {"self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"}
    optimizer = strategy.optimizer(model, lr=1e-2)
    x, labels = torch.randn(8, 16, dtype=torch.float64), torch.arange(8) % 5
    losses = []
    for step in range(1, 31):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.run_events(step, model, optimizer)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    plain.load_state_dict(strategy.dense_state_dict(model), strict=True)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), atol=1e-10, rtol=0)


def test_any_torch_optimizer_serves_and_forgets() -> None:
    """torch.optim.AdamW beside ours: the same weights over two merges, moments thinned alike. 1e-12: float64."""
    ends = []
    for ours in (True, False):
        model = block()
        strategy = lowrank_train.reparametrise(
            model, "relora", r=4, relora=5, optimizer_magnitude_pruning=0.8, betas=(0.9, 0.99)
        )
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer: torch.optim.Optimizer
        if ours:
            optimizer = strategy.optimizer(model, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0)
        x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for step in range(1, 13):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            strategy.run_events(step, model, optimizer)
        ends.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-12, rtol=0)


def test_published_names_and_conventions() -> None:
    model = block()
    strategy = lowrank_train.reparametrise(
        model, "relora", lora_r=4, lora_alpha=32, lora_dropout=0.1, relora=10, cycle_length=20, published=True
    )
    layer = layers_of(model)["mlp.up_proj"]
    assert isinstance(layer, LoRALinear) and layer.weights.scale == 8 and layer.weights.dropout == 0.1
    assert not layer.A.any() and not layer.B.any()  # its dead start
    assert strategy.merge == Merge(10, 1, "random", 0.999, 20, True)
    assert [event.due(11) for event in strategy.events] == [True, False]
    model = block()
    lowrank_train.reparametrise(model, "sltrain", r=4, lora_alpha=8, sp_ratio=0.05, target_modules=["mlp"])
    assert list(layers_of(model)) == ["mlp.up_proj", "mlp.down_proj"]
    sparse = layers_of(model)["mlp.up_proj"]
    assert isinstance(sparse, SLTrainLinear) and sparse.sparse_value.numel() == int(0.05 * 16 * 32)


def test_a_single_layer_needs_no_model() -> None:
    linear = nn.Linear(12, 20)
    layer = LoRALinear.from_linear(linear, rank=3, alpha=6.0)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), linear(x))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("relorra", {}, "did you mean relora?"),
        ("lora", {"rnk": 4}, "did you mean rank?"),
        ("lora", {"rank": 17}, "above the short side of 16 x 16"),
        ("lora", {"modules": ["attention"]}, "matched no"),
        ("peft", {"type": "VERAA"}, "Did you mean VERA?"),
        ("peft", {"type": "vera", "rr": 4}, "VERA has no option rr"),
        ("peft", {"type": "adalora"}, "total_step: AdaLoRA's budget needs the number of updates"),
        ("relora", {"lora_only": True}, "merges need the original weights"),
        ("relora", {"optimizer_magnitude_pruning": 0.8, "optimizer_random_pruning": 0.9}, "exactly one of"),
    ],
)
def test_what_is_wrong_is_said_in_the_names_of_the_call(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("?", r"\?")) as caught:
        lowrank_train.reparametrise(block(), method, **options)
    assert "strategy.weights.rank" not in str(caught.value)
