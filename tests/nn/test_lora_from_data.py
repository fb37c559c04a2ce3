"""LoRA-GA's and EVA's starts: against the gradients and the inputs of the plain model, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.nn.lora_from_data import EVA, LoRAFromDataLinear, LoRAGA
from lowrank_train.nn.reparam import Origin, layers_of
from tests.nn.methods import Toy, batch_of, train
from tests.nn.test_lora import row

DOUBLE = torch.float64


def started(name: str) -> tuple[Toy, Toy]:
    """The plain model, with the gradients of the first two batches, and the one whose adapters have just begun."""
    plain, model = Toy(DOUBLE), Toy(DOUBLE)
    for tokens in (batch_of(1), batch_of(2)):
        nn.functional.cross_entropy(plain(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    inner = {"_target_": "lowrank_train.optim.moments.Adam"}
    strategy = row(name).strategy(select=["*.lora_A", "*.lora_B"], inner=inner, freeze_rest=True)
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.02)
    train(model, strategy, optimizer, range(1, 2))
    for path, layer in layers_of(model).items():
        assert torch.equal(layer.dense_weight(), plain.get_parameter(f"{path}.weight"))  # nothing moves while watched
    train(model, strategy, optimizer, range(2, 3))
    assert not any(optimizer.state.get(param) for param in model.parameters())  # Adam begins with A and B
    return plain, model


def test_lora_ga_begins_along_the_first_gradient() -> None:
    """Tall, wide and square; 1e-10: float64 decompositions of gradients of 1e-2, whose singular values are apart."""
    plain, model = started("lora_ga")
    for path, layer in layers_of(model).items():
        assert isinstance(layer, LoRAFromDataLinear) and layer.watcher is None
        weight = plain.get_parameter(f"{path}.weight")
        assert weight.grad is not None
        left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
        scale = len(weight) ** 0.25 / 4
        for found, expected in ((layer.A, scale * right[:3]), (layer.B.T, scale * left[:, 3:6].T)):
            signs = (found * expected).sum(1, keepdim=True).sign()  # a singular vector's is free
            torch.testing.assert_close(found.detach(), signs * expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(layer.dense_weight(), weight, atol=1e-14, rtol=0)
        assert not torch.equal(layer.weight, weight)


def test_a_step_of_lora_ga_follows_the_gradient() -> None:
    """Theorem 3.1: of all A, B, these make s (dB A + B dA) the best approximation of G within rank 2 r."""
    plain, model = started("lora_ga")
    for path, layer in layers_of(model).items():
        assert isinstance(layer, LoRAFromDataLinear)
        grad = plain.get_parameter(f"{path}.weight").grad
        assert grad is not None
        step = (grad @ layer.A.T) @ layer.A + layer.B @ (layer.B.T @ grad)
        left, values, right = torch.linalg.svd(grad, full_matrices=False)
        best = left[:, :6] * values[:6] @ right[:6]
        share = (step * best).sum() / (step.norm() * best.norm())
        assert share > 1 - 1e-9


def test_eva_begins_with_the_principal_directions_of_the_inputs() -> None:
    """The sketch is as wide as the inputs here, so nearly exact: 1e-5, from the shift that keeps its root real."""
    plain, model = started("eva")
    seen: dict[str, list[Tensor]] = {path: [] for path in layers_of(model)}
    for path, rows in seen.items():
        plain.get_submodule(path).register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        plain(batch_of(1)), plain(batch_of(2))
    for path, layer in layers_of(model).items():
        assert isinstance(layer, LoRAFromDataLinear) and layer.watcher is None
        rows = torch.cat(seen[path])
        expected = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:3]
        signs = (layer.A * expected).sum(1, keepdim=True).sign()
        torch.testing.assert_close(layer.A.detach(), signs * expected, atol=1e-5, rtol=0)
        assert not layer.B.any()


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_narrow_sketches_find_what_stands_out(shape: tuple[int, int]) -> None:
    """Rank 4 of a spectrum that halves: gradients and inputs of many more directions than the sketch has columns."""
    drawn = torch.Generator().manual_seed(1)
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=DOUBLE)
    decay = 0.5 ** torch.arange(shape[1], dtype=DOUBLE)
    mixing = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=drawn, dtype=DOUBLE)).Q
    x = torch.randn(500, shape[1], generator=drawn, dtype=DOUBLE) * decay @ mixing + 3.0
    for choice in (EVA(modules=["*"], rank=4), LoRAGA(modules=["*"], rank=4)):
        layer = choice.layer(linear, Origin("layer", 3))
        assert isinstance(layer, LoRAFromDataLinear)
        y = layer(x)
        layer.zero_grad()
        (y * torch.randn(500, shape[0], generator=drawn, dtype=DOUBLE)).sum().backward()
        total = dict(layer.named_buffers()).get("watcher.total")
        matrix = x - x.mean(0) if total is None else total.clone()
        layer.start_(lambda param: None)
        best = torch.linalg.svd(matrix, full_matrices=False).Vh[:4]
        directions = nn.functional.normalize(layer.A.detach(), dim=1)
        assert (directions @ best.T).norm() ** 2 > 4 * 0.999  # the same four-dimensional space


def test_only_training_is_watched_and_wrong_options_are_refused() -> None:
    linear = nn.Linear(12, 20, dtype=DOUBLE)
    layer = LoRAFromDataLinear.from_linear(linear, rank=3)
    layer.eval()(torch.ones(2, 12, dtype=DOUBLE)).sum().backward()
    assert not dict(layer.named_buffers())["watcher.total"].any()
    for options, fault in (
        ({"rank": 7}, "rank is 7, above half of the short side of 20 x 12"),
        ({"rank": 3, "gamma": 0.0}, "gamma is 0.0; it must be above 0"),
        ({"rank": 3, "watched_updates": 0}, "watched_updates is 0; it must be at least 1"),
        ({"rank": 3, "init": "pissa"}, "init is pissa, but LoRAGA has a start of its own"),
        ({"rank": 3, "warm_start_steps": 2}, "warm_start_steps is 2, but LoRAGA begins with"),
    ):
        with pytest.raises(ValueError, match=fault.replace(".", r"\.")):
            LoRAFromDataLinear.from_linear(linear, **options)
