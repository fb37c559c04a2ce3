"""W = B A and the dense path that may lead it: starts, decay, sizes, against linear algebra and plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.config import compose
from lowrank_train.config.weights_checks import weights_remarks
from lowrank_train.models import meta_model
from lowrank_train.nn.factorised import LowRank, LowRankLinear
from lowrank_train.nn.guided import GuidedLinear
from lowrank_train.nn.reparam import layers_of
from tests.nn.methods import Method, Toy, batch_of, train, weights

SHAPES = [(20, 12), (8, 20), (16, 16), (13, 7), (7, 13)]


def built(shape: tuple[int, int], dtype: torch.dtype = torch.float64, **options: object) -> LowRankLinear:
    torch.manual_seed(shape[0])
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    layer = LowRankLinear.from_linear(linear, name="layer", seed=3, **({"rank": 3} | options))
    assert isinstance(layer, LowRankLinear)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectral_start_loses_the_discarded_part_alone(shape: tuple[int, int]) -> None:
    """|B A - W0|_F^2 is the sum of the squares of the discarded singular values, and the factors share the kept ones
    evenly; 1e-12 in float64, of sums of 400 numbers below 1."""
    layer = built(shape)
    torch.manual_seed(shape[0])
    weight = nn.Linear(shape[1], shape[0], dtype=torch.float64).weight.detach()
    values = torch.linalg.svdvals(weight)
    error = (layer.dense_weight().detach() - weight).square().sum()
    torch.testing.assert_close(error, values[3:].square().sum(), atol=1e-12, rtol=0)
    for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
        torch.testing.assert_close(gram.detach(), values[:3].diag(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("share, kept_energy", [(1 / 8, 0.38), (1 / 4, 0.62), (1 / 2, 0.89)])
def test_spectral_start_keeps_the_known_share_of_energy(share: float, kept_energy: float) -> None:
    """38, 62 and 89 % of a square Gaussian matrix at rank d/8, d/4, d/2, as the Marchenko-Pastur law has it; one point
    for the finite size and the rounding of the figures."""
    size = 256
    linear = nn.Linear(size, size, bias=False)
    linear.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    layer = LowRankLinear.from_linear(linear, rank=int(share * size))
    found = layer.dense_weight().detach().square().sum() / linear.weight.detach().square().sum()
    assert float(found) == pytest.approx(kept_energy, abs=0.01)


@pytest.mark.parametrize("rank", [8, 64])
def test_other_starts_have_the_variances_they_are_named_for(rank: int) -> None:
    """Products of 200 x 300: 5 % for a standard deviation of 60,000 entries that share factors. The naive one's is
    0.02^2 sqrt(rank), whatever W0."""
    linear = nn.Linear(300, 200, bias=False)
    linear.weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    for init, std in (("variance", 0.05), ("naive", 0.02**2 * math.sqrt(rank))):
        layer = LowRankLinear.from_linear(linear, rank=rank, init=init)
        assert float(layer.dense_weight().detach().std()) == pytest.approx(std, rel=0.05)
        assert isinstance(layer, LowRankLinear)
        assert float(layer.A.detach().std()) == pytest.approx(float(layer.B.detach().std()), rel=0.1)


def test_a_start_with_one_zero_factor_is_not_dead() -> None:
    """A uniform in +-1/sqrt(n), B = 0: the first update moves B, the next A too."""
    layer = built((20, 12), init="zero_b")
    assert not layer.B.any()
    assert 0.9 / math.sqrt(12) < float(layer.A.detach().abs().max()) <= 1 / math.sqrt(12)
    x = torch.randn(5, 12, dtype=torch.float64)
    for moves in (False, True):
        layer.zero_grad()
        layer(x).sum().backward()
        assert layer.A.grad is not None and layer.B.grad is not None
        assert bool(layer.A.grad.any()) == moves and layer.B.grad.any()
        with torch.no_grad():
            layer.B.sub_(0.1 * layer.B.grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_two_linear_layers_bit_for_bit(shape: tuple[int, int]) -> None:
    """Forward and backward in float32."""
    layer = built(shape, torch.float32)
    plain = nn.Sequential(nn.Linear(shape[1], 3, bias=False), nn.Linear(3, shape[0]))
    with torch.no_grad():
        for param, value in zip(plain.parameters(), (layer.A, layer.B, layer.bias), strict=True):
            assert value is not None
            param.copy_(value)
    x = torch.randn(4, 6, shape[1])
    assert torch.equal(layer(x), plain(x))
    for model in (layer, plain):
        model(x).square().sum().backward()
    for param, value in zip(plain.parameters(), (layer.A, layer.B, layer.bias), strict=True):
        assert value is not None and value.grad is not None and param.grad is not None
        assert torch.equal(value.grad, param.grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frobenius_decay_follows_the_gradient_of_the_product_norm(shape: tuple[int, int]) -> None:
    """p - lr lambda d(|B A|_F^2 / 2)/dp, both from the old factors; 1e-12 in float64."""
    layer = built(shape)
    (layer.dense_weight().square().sum() / 2).backward()
    assert layer.A.grad is not None and layer.B.grad is not None
    expected = layer.A.detach() - 0.03 * layer.A.grad, layer.B.detach() - 0.05 * layer.B.grad
    layer.decay_(0.03, 0.05)
    for found, value in zip((layer.A, layer.B), expected, strict=True):
        torch.testing.assert_close(found.detach(), value, atol=1e-12, rtol=0)


def test_frobenius_decay_happens_after_every_update_at_its_learning_rate() -> None:
    """One update with and one without: they differ by lr lambda B A A^T of the updated factors; 1e-7 in float32."""
    ends = []
    for decay in (0.0, 0.5):
        method = Method("lowrank", weights("factorised.LowRank", rank=3, frobenius_decay=decay))
        model, strategy = Toy(), method.strategy()
        strategy.prepare(model)
        train(model, strategy, strategy.optimizer(model, lr=0.01), range(1, 2))
        ends.append({name: layer for name, layer in layers_of(model).items() if isinstance(layer, LowRankLinear)})
    for name, free in ends[0].items():
        decayed, step = ends[1][name], 0.01 * 0.5
        expected = free.B - step * free.B @ free.A @ free.A.T
        torch.testing.assert_close(decayed.B, expected, atol=1e-7, rtol=0)
        assert not torch.equal(decayed.A, free.A)


def guided_model(steps: int, dtype: torch.dtype = torch.float32) -> tuple[Toy, object, torch.optim.Optimizer]:
    method = Method("guided", weights("factorised.LowRank", rank=4, guided_steps=steps))
    model, strategy = Toy(dtype), method.strategy()
    strategy.prepare(model)
    return model, strategy, strategy.optimizer(model, lr=0.01)


def test_guidance_begins_as_the_factors_alone_would() -> None:
    """W_g is their product, so that the first loss is the one without a guide; 1e-6 for the order of sums."""
    guided, _, _ = guided_model(5)
    alone, _, _ = guided_model(0)
    torch.testing.assert_close(guided(batch_of(1)), alone(batch_of(1)), atol=1e-6, rtol=0)
    assert all(isinstance(layer, LowRankLinear) and layer.guide is None for layer in layers_of(alone).values())


def test_guidance_fades_as_a_cosine_and_its_matrix_goes() -> None:
    """alpha of update t, counted from 0, is (1 + cos(pi t / 5)) / 2; then neither W_g nor its moments are left."""
    model, strategy, optimizer = guided_model(5)
    layer = layers_of(model)["tall"]
    assert isinstance(layer, GuidedLinear)
    shares: list[float | None] = [float(layer.alpha)]  # type: ignore[arg-type]
    states: list[int] = []

    def note(step: int) -> None:
        shares.append(None if layer.alpha is None else float(layer.alpha))
        states.append(len(optimizer.state))

    train(model, strategy, optimizer, range(1, 8), note)  # type: ignore[arg-type]
    expected = [(1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    assert shares[:5] == pytest.approx(expected, abs=1e-7)
    assert shares[5:] == [None] * 3
    assert states[3] - states[4] == 3  # a guide of each of three layers
    assert not [name for name in model.state_dict() if "guide" in name or "alpha" in name]


class Reference(nn.Module):
    """o = alpha W_g x + (1 - alpha) B A x in plain torch, in float64, as one tall matrix of a small regression."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.A = nn.Parameter(layer.A.detach().clone())
        self.B = nn.Parameter(layer.B.detach().clone())
        self.guide = nn.Parameter(self.B.detach() @ self.A.detach())
        assert layer.bias is not None
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor, alpha: float) -> Tensor:
        return alpha * (x @ self.guide.T) + (1 - alpha) * (x @ self.A.T @ self.B.T) + self.bias


def test_guided_losses_are_those_of_plain_torch() -> None:
    """Nine updates over the end of the guidance with torch.optim.Adam; 1e-10 in float64 of losses near 1."""
    layer = built((20, 12), guided_steps=6)
    reference = Reference(layer)
    strategy = LowRank(rank=3, guided_steps=6)
    ours, theirs = torch.optim.Adam(layer.parameters(), 0.01), torch.optim.Adam(reference.parameters(), 0.01)
    x = torch.randn(50, 12, dtype=torch.float64)
    target = x @ torch.randn(12, 20, dtype=torch.float64) / 4
    for step in range(9):
        alpha = (1 + math.cos(math.pi * step / 6)) / 2 if step < 6 else 0.0
        losses = [(layer(x) - target).square().mean(), (reference(x, alpha) - target).square().mean()]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-10, rtol=0)
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for event in strategy.events():
            if event.due(step + 1):
                event.run(event.number(step + 1), {"layer": layer}, None)  # type: ignore[arg-type]
    assert layer.guide is None


@pytest.mark.parametrize(
    "size, rank, millions",
    [("60m", 128, 42.77), ("130m", 256, 94.00), ("350m", 256, 185.22), ("1b", 512, 609.31), ("7b", 1024, 2820.94)],
)
def test_sizes_are_the_closed_forms(size: str, rank: int, millions: float) -> None:
    """r (m + n) a matrix beside all that stays dense; the totals are those of the sheet of methods, exact to its
    digits."""
    model = meta_model(compose([f"model=llama_{size}"]).model, vocab_size=32000)
    shapes = [m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    others = sum(param.numel() for param in model.parameters()) - sum(shape.numel() for shape in shapes)
    Method("lowrank", weights("factorised.LowRank", rank=rank, modules=LowRank().modules)).strategy().prepare(model)
    total = sum(param.numel() for param in model.parameters())
    assert total == others + sum(rank * (m + n) for m, n in shapes)
    assert round(total / 1e6, 2) == millions


def test_bad_values_name_their_keys() -> None:
    for option, value in (("rank", 0), ("frobenius_decay", -1.0), ("guided_steps", -1)):
        with pytest.raises(ValueError, match=rf"strategy\.weights\.{option} is {value}"):
            LowRank(**{option: value})
    with pytest.raises(ValueError, match="rank is 9, above the short side of 8 x 20"):
        built((8, 20), rank=9)


def test_a_guide_that_outlives_the_run_is_remarked_on() -> None:
    """Half the run is fine."""
    words = ["recipe=null", "strategy=lowrank", "strategy.weights.rank=8", "trainer.steps=100"]
    (remark,) = weights_remarks(compose([*words, "strategy.weights.guided_steps=200"]))
    assert "guided_steps=200 is more than trainer.steps=100" in remark
    assert not list(weights_remarks(compose([*words, "strategy.weights.guided_steps=50"])))
