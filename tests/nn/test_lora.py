"""LoRA's options against their formulas: starts, scales, rates, what backward keeps, and a trajectory by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.config import UserError, compose
from lowrank_train.config.weights_checks import weights_remarks
from lowrank_train.nn.lora import LoRALinear
from lowrank_train.train.recorder import metric_columns
from tests.nn.methods import METHODS, Method, Toy, batch_of, train, weights

SHAPES = [(20, 12), (8, 20), (16, 16), (7, 13)]  # (out, in): tall, wide, square, odd


def linear_of(shape: tuple[int, int], dtype: torch.dtype = torch.float64, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)


def row(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_principal_starts_take_their_product_out_of_the_weight(init: str, shape: tuple[int, int]) -> None:
    """s B A is the best approximation of rank 3 (PiSSA) or s Q[:, :3] R[:3] (OLoRA), whatever the factors' signs.

    1e-12: float64 decompositions of matrices of norm about 3.
    """
    linear = linear_of(shape)
    original = linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, rank=3, alpha=5.0, init=init)
    assert isinstance(layer, LoRALinear)
    if init == "pissa":
        left, values, right = torch.linalg.svd(original, full_matrices=False)
        expected = left[:, :3] @ values[:3].diag() @ right[:3]
    else:
        basis, triangle = torch.linalg.qr(original)
        expected = 5 / 3 * basis[:, :3] @ triangle[:3]
    torch.testing.assert_close(layer.update_of_weight(), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.weight.detach(), original - expected, atol=1e-12, rtol=0)
    first, second = layer.factors
    assert (first.shape, second.shape) == ((3, shape[1]), (shape[0], 3))
    if init == "pissa":  # the root of each singular value on either side
        torch.testing.assert_close(first.norm(dim=1), (values[:3] / (5 / 3)).sqrt(), atol=1e-12, rtol=0)
        torch.testing.assert_close(second.norm(dim=0), (values[:3] / (5 / 3)).sqrt(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_principal_starts_in_bfloat16_lose_only_what_the_residual_rounds(init: str) -> None:
    """The product that is taken out is that of the rounded factors, so 2^-9 is relative to W_res, not to W0."""
    linear = linear_of((20, 12), torch.bfloat16)
    with torch.no_grad():
        linear.weight.add_(torch.ones(20, 12) * 4)  # one large singular value
    original = linear.weight.detach().float().clone()
    layer = LoRALinear.from_linear(linear, rank=3, alpha=3.0, init=init)
    error = (layer.dense_weight() - original).abs().max()
    assert error <= 2**-8 * layer.get_parameter("weight").float().abs().max()


def test_random_starts_have_the_published_spread() -> None:
    """A uniform in +-1/sqrt(n), or N(0, 1/r^2); 4,096 draws, so that 5 % is over four standard errors of a spread."""
    for init, std in (("kaiming", 1 / math.sqrt(3 * 512)), ("gaussian", 1 / 8)):
        layer = LoRALinear.from_linear(linear_of((16, 512)), rank=8, init=init)
        assert isinstance(layer, LoRALinear)
        first, second = layer.factors
        assert abs(first.std().item() / std - 1) < 0.05
        assert not second.any()
        if init == "kaiming":
            assert first.abs().max() <= 1 / math.sqrt(512)


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    layer = LoRALinear.from_linear(linear_of((8, 20)), rank=4, alpha=16.0)
    stable = LoRALinear.from_linear(linear_of((8, 20)), rank=4, alpha=16.0, rslora=True)
    assert isinstance(layer, LoRALinear) and isinstance(stable, LoRALinear)
    assert (layer.weights.scale, stable.weights.scale) == (4.0, 8.0)
    for one in (layer, stable):
        with torch.no_grad():
            one.factors[1].normal_(generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(stable.update_of_weight(), 2 * layer.update_of_weight(), atol=1e-12, rtol=0)


def test_lora_plus_moves_b_that_many_times_as_fast() -> None:
    """The first step of AdamW is the rate itself wherever there is a gradient (1e-3: its eps of 1e-8)."""
    method = row("lora_plus")
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.01)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"rest": 0.01, "rest_x16": 0.16}
    served = {slot.name for param, slot in optimizer.slots.items() if param in set(optimizer.param_groups[1]["params"])}
    assert served == {f"{name}.lora_B" for name in ("tall", "square", "wide")}
    assert {f"train/lr_{name}" for name in rates} <= set(metric_columns(strategy.group_names(model)))
    train(model, strategy, optimizer, range(1, 2))
    for name in ("tall", "square", "wide"):
        moved = model.get_submodule(name).get_parameter("lora_B").abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.16), atol=0, rtol=1e-3)


def saved_elements(module: nn.Module, x: Tensor) -> int:
    """Numbers that backward keeps, parameters aside."""
    own = {param.data_ptr() for param in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def test_lora_fa_keeps_only_the_compressed_input() -> None:
    """T x r numbers a layer, where LoRA keeps T x n of x as well; with dropout its mask is kept after all."""
    rows, rank, width = 64, 8, 256

    def chain(**options: Any) -> nn.Sequential:
        layers = [linear_of((width, width), torch.float32) for _ in range(4)]
        return nn.Sequential(*(LoRALinear.from_linear(layer, rank=rank, **options) for layer in layers))

    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    assert saved_elements(chain(train_a=False), x) == 4 * rows * rank
    assert saved_elements(chain(), x) == 4 * rows * (rank + width)
    masks = 3 * rows * width  # of dropout, but for the first layer, whose input asks for no gradient
    assert saved_elements(chain(train_a=False, dropout=0.1), x) == 4 * rows * rank + masks


def test_trajectory_is_that_of_a_loop_by_hand() -> None:
    """y = x W0^T + s x A^T B^T with torch.optim.AdamW over everything but W0, 12 updates in float64; 1e-10 for the
    order of operations, which Adam's division can enlarge."""
    model, strategy = Toy(torch.float64), row("lora").strategy()
    strategy.prepare(model)
    twin = {name: value.detach().clone() for name, value in model.state_dict().items()}
    frozen = {f"{name}.weight" for name in ("tall", "square", "wide")}
    trained = [value.requires_grad_() for name, value in twin.items() if name not in frozen]
    by_hand = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01, eps=1e-8)

    def adapted(x: Tensor, name: str) -> Tensor:
        update = F.linear(F.linear(x, twin[f"{name}.lora_A"]), twin[f"{name}.lora_B"])
        return F.linear(x, twin[f"{name}.weight"], twin.get(f"{name}.bias")) + 16 / 3 * update

    expected = []
    for step in range(1, 13):
        tokens = batch_of(step)
        hidden = adapted(F.embedding(tokens, twin["embedding.weight"]), "tall")
        hidden = F.layer_norm(hidden, (20,), twin["norm.weight"], twin["norm.bias"])
        hidden = adapted(hidden + adapted(hidden, "square").tanh(), "wide")
        logits = F.linear(hidden, twin["head.weight"], twin["head.bias"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        expected.append(loss.item())
        by_hand.zero_grad()
        loss.backward()
        by_hand.step()
    optimizer = strategy.optimizer(model, lr=0.02, weight_decay=0.01)
    losses = train(model, strategy, optimizer, range(1, 13))
    assert losses == pytest.approx(expected, rel=1e-6)  # the losses are measured in float32
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin[name].detach(), atol=1e-10, rtol=0)


def test_a_dead_start_is_said_before_the_run() -> None:
    words = ["recipe=null", "strategy=relora", "strategy.weights.init=zero", "strategy.merge.every=500"]
    (remark,) = [line for line in weights_remarks(compose(words)) if "init=zero" in line]
    assert "before the first merge, which comes after 500 updates" in remark
    words = ["recipe=null", "strategy=lora", "strategy.weights.init=zero"]
    (remark,) = weights_remarks(compose(words))
    assert "learns ever" in remark
    assert not list(weights_remarks(compose(["recipe=null", "strategy=lora"])))


def test_a_dead_start_learns_nothing_before_the_first_merge() -> None:
    method = Method("dead", weights("lora.LoRA", rank=3, init="zero"), merge={"every": 4})
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    optimizer = strategy.optimizer(model, lr=0.02)
    train(model, strategy, optimizer, range(1, 4))
    assert not model.get_submodule("tall").get_parameter("lora_B").any()
    train(model, strategy, optimizer, range(4, 6))
    assert model.get_submodule("tall").get_parameter("lora_B").any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 0}, "strategy.weights.rank is 0"),
        ({"rank": 9}, "above the short side of 8 x 20"),
        ({"dropout": 1.0}, "strategy.weights.dropout is 1.0"),
        ({"lr_ratio_b": 0.0}, "strategy.weights.lr_ratio_b is 0.0"),
        ({"init": "pissa", "alpha": 0.0}, "strategy.weights.alpha is 0.0"),
        ({"warm_start_steps": -1}, "strategy.weights.warm_start_steps is -1"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_their_key(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LoRALinear.from_linear(linear_of((8, 20)), **options)


def test_a_merge_into_bfloat16_to_the_nearest_is_refused() -> None:
    method = Method("narrow", weights("lora.LoRA", rank=3), merge={"every": 4})
    with pytest.raises(UserError, match="rounding=compensated"):
        method.strategy().prepare(Toy(torch.bfloat16))
