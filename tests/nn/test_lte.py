"""LTE's parallel heads against plain LoRA and against LoRAs that are trained apart and averaged."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_train.config import UserError, compose
from lowrank_train.nn.parallel_heads import FACTORS, ParallelHeadsLinear
from tests.nn.methods import METHODS, Method, Toy, batch_of, train, weights
from tests.nn.test_lora import SHAPES, linear_of

LAYERS = ("tall", "square", "wide")


def built(shape: tuple[int, int], heads: int = 2, rank: int = 3) -> ParallelHeadsLinear:
    """A layer whose factors and primes are all random."""
    layer = ParallelHeadsLinear.from_linear(linear_of(shape, bias=True), heads=heads, rank=rank, alpha=6.0)
    assert isinstance(layer, ParallelHeadsLinear)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in (layer.lora_A, layer.lora_B, layer.merged_A, layer.merged_B):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return layer


def differences(layer: ParallelHeadsLinear) -> list[Tensor]:
    """D_h = s (B_h A_h - B'_h A'_h) of each head, s = 6 / 3."""
    heads = zip(layer.lora_B, layer.lora_A, layer.merged_B, layer.merged_A, strict=True)
    return [2.0 * (b @ a - old_b @ old_a) for b, a, old_b, old_a in heads]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_head_sees_its_part_and_evaluation_their_mean(shape: tuple[int, int], heads: int) -> None:
    """1e-12: float64 sums of 20 terms in another order."""
    layer = built(shape, heads)
    x = torch.randn(4, 5, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = zip(x.chunk(heads), differences(layer), strict=True)
    expected = torch.cat([F.linear(part, layer.weight + difference, layer.bias) for part, difference in apart])
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    mean = layer.weight + torch.stack(differences(layer)).mean(0)
    torch.testing.assert_close(layer.dense_weight(), mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, mean, layer.bias), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_merge_takes_the_mean_and_resets_nothing(shape: tuple[int, int]) -> None:
    layer = built(shape)
    mean = layer.weight + torch.stack(differences(layer)).mean(0)
    factors = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    layer.fold_(1)
    torch.testing.assert_close(layer.weight.detach(), mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.dense_weight(), mean, atol=1e-12, rtol=0)
    for now, before in zip((layer.lora_A, layer.lora_B, layer.merged_A, layer.merged_B), factors * 2, strict=True):
        assert torch.equal(now, before)
    assert not layer.renewed()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compression_begins_orthogonal_and_keeps_lengths(shape: tuple[int, int]) -> None:
    """A A^T = (n / r) I for each head (1e-12), so that E ||A x||^2 = ||x||^2: 2,000 draws, 5 % is over 3 errors."""
    layer = ParallelHeadsLinear.from_linear(linear_of(shape), heads=3, rank=4)
    assert isinstance(layer, ParallelHeadsLinear)
    columns = shape[1]
    expected = (columns / 4 * torch.eye(4, dtype=torch.float64)).expand(3, 4, 4)
    torch.testing.assert_close((layer.lora_A @ layer.lora_A.mT).detach(), expected, atol=1e-12, rtol=0)
    x = torch.randn(2000, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs((x @ layer.lora_A[0].T).square().sum() / x.square().sum() - 1) < 0.05
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])
    assert not layer.lora_B.any() and not layer.merged_A.any()


def test_one_head_merged_at_every_update_is_lora() -> None:
    """W + D_1 is W0 + s B A at all times; 12 updates in float64, 1e-10 for the sums that merging splits."""
    alone = Method("lte", weights("parallel_heads.ParallelHeads", heads=1, rank=3, alpha=6.0))
    merged = Method("lte", dict(alone.weights), merge={"every": 1, "moments": "keep"})
    lora = Method("lora", weights("lora.LoRA", rank=3, alpha=6.0))
    ends = []
    for method in (lora, alone, merged):
        model, strategy = Toy(torch.float64), method.strategy()
        strategy.prepare(model)
        if method is lora:
            twin = Toy(torch.float64)
            alone.strategy().prepare(twin)
            for name in LAYERS:
                with torch.no_grad():
                    model.get_submodule(name).get_parameter("lora_A").copy_(twin.get_submodule(name).lora_A[0])
        losses = train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, 13))
        ends.append((losses, strategy.dense_state_dict(model)))
    for losses, dense in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-6)  # measured in float32
        for name, value in dense.items():
            torch.testing.assert_close(value, ends[0][1][name], atol=1e-10, rtol=0)


def test_four_heads_are_four_loras_averaged_after_every_round() -> None:
    """Each worker has a copy of the model, its row of the batch and a quarter of the loss; every 3 updates the mean of
    their matrices becomes the base of all, less each worker's own product. 12 updates in float64; 1e-10 as above."""
    method = Method(
        "lte",
        weights("parallel_heads.ParallelHeads", heads=4, rank=3, alpha=6.0),
        merge={"every": 3, "moments": "keep"},
    )
    frozen = {"select": ["*.lora_A", "*.lora_B"], "inner": method.config().rest, "freeze_rest": True}
    model, strategy = Toy(torch.float64), method.strategy(**frozen)
    strategy.prepare(model)
    workers = [Worker(model, head) for head in range(4)]
    train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, 13))
    for step in range(1, 13):
        for worker, row in zip(workers, batch_of(step), strict=True):
            worker.update(row[None])
        if step % 3 == 0:
            for name in LAYERS:
                mean = torch.stack([worker.matrix(name) for worker in workers]).mean(0)
                for worker in workers:
                    worker.base[name] = mean - worker.product(name)
    for name in LAYERS:
        expected = torch.stack([worker.matrix(name) for worker in workers]).mean(0)
        torch.testing.assert_close(model.get_submodule(name).dense_weight(), expected, atol=1e-10, rtol=0)


class Worker:
    """Plain LoRA on a copy of a model's layers, with the factors that one head began with."""

    def __init__(self, model: nn.Module, head: int) -> None:
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.base = {name: self.state[f"{name}.weight"] for name in LAYERS}
        self.factors = {
            f"{name}.{factor}": self.state[f"{name}.{factor}"][head].clone().requires_grad_()
            for name in LAYERS
            for factor in ("lora_A", "lora_B")
        }
        self.optimizer = torch.optim.AdamW(self.factors.values(), lr=0.02, weight_decay=0.0)

    def product(self, name: str) -> Tensor:
        return 2.0 * (self.factors[f"{name}.lora_B"] @ self.factors[f"{name}.lora_A"]).detach()

    def matrix(self, name: str) -> Tensor:
        return self.base[name] + self.product(name)

    def adapted(self, x: Tensor, name: str) -> Tensor:
        update = F.linear(F.linear(x, self.factors[f"{name}.lora_A"]), self.factors[f"{name}.lora_B"])
        return F.linear(x, self.base[name], self.state.get(f"{name}.bias")) + 2.0 * update

    def update(self, tokens: Tensor) -> None:
        hidden = self.adapted(F.embedding(tokens, self.state["embedding.weight"]), "tall")
        hidden = F.layer_norm(hidden, (20,), self.state["norm.weight"], self.state["norm.bias"])
        hidden = self.adapted(hidden + self.adapted(hidden, "square").tanh(), "wide")
        logits = F.linear(hidden, self.state["head.weight"], self.state["head.bias"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()) / 4
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def on_two_ranks(shape: tuple[int, int], heads: int) -> tuple[ParallelHeadsLinear, list[ParallelHeadsLinear]]:
    """One layer with the heads of both ranks, and the layer of each rank with its own, as after some updates."""
    whole, ranks = built(shape, 2 * heads), []
    for rank in range(2):
        layer = ParallelHeadsLinear.from_linear(
            linear_of(shape, bias=True), heads=heads, rank=3, alpha=6.0, across_ranks=True
        )
        assert isinstance(layer, ParallelHeadsLinear)
        layer.place_(rank, 2)
        with torch.no_grad():
            for name in FACTORS:
                layer.get_parameter(name).copy_(whole.get_parameter(name).chunk(2)[rank])
        ranks.append(layer)
    return whole, ranks


def adding(monkeypatch: pytest.MonkeyPatch, share: Tensor) -> list[Tensor]:
    """A group of two ranks, the other of which adds `share` to every sum; what this one has sent."""
    sent: list[Tensor] = []

    def all_reduce(tensor: Tensor) -> None:
        sent.append(tensor.clone())
        tensor += share

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return sent


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_on_two_ranks_are_the_heads_of_one_layer(
    shape: tuple[int, int], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training (each rank its rows), in evaluation and after a merge; 1e-12 as above."""
    whole, ranks = on_two_ranks(shape, heads)
    mean = whole.weight + torch.stack(differences(whole)).mean(0)
    x = torch.randn(4, 5, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = whole(x).chunk(2)
    shares = [torch.stack(differences(layer)).mean(0).detach() / 2 for layer in reversed(ranks)]
    for layer, share, part, expected in zip(ranks, shares, x.chunk(2), trained, strict=True):
        sent = adding(monkeypatch, share)
        torch.testing.assert_close(layer(part), expected, atol=1e-12, rtol=0)
        assert not sent
        layer.meet_ranks_()
        for _ in range(2):  # ranks may have different numbers of batches: nothing more is sent
            torch.testing.assert_close(layer.eval()(x), F.linear(x, mean, layer.bias), atol=1e-12, rtol=0)
        assert len(sent) == 1
        layer.train()(part)
        with torch.no_grad():
            layer.lora_B.add_(1.0)  # as an update: what the ranks have found before is void
        assert layer.dense_weight().sub(mean).abs().max() > 1e-3 and len(sent) == 2
        with torch.no_grad():
            layer.lora_B.sub_(1.0)
        layer.meet_ranks_()
        layer.fold_(1)
    for layer in ranks:
        torch.testing.assert_close(layer.weight, mean, atol=1e-12, rtol=0)
        assert torch.equal(layer.merged_A, layer.lora_A) and torch.equal(layer.merged_B, layer.lora_B)


def test_ranks_begin_with_the_heads_of_one_layer_and_one_process_loads_them_all() -> None:
    whole = ParallelHeadsLinear.from_linear(linear_of((20, 12)), heads=4, rank=3)
    ranks = [ParallelHeadsLinear.from_linear(linear_of((20, 12)), heads=2, rank=3, across_ranks=True) for _ in range(2)]
    for rank, layer in enumerate(ranks):
        layer.place_(rank, 2)
        assert torch.equal(layer.get_parameter("lora_A"), whole.get_parameter("lora_A").chunk(2)[rank])
        assert list(layer.rank_local()) == list(FACTORS)
    whole, _ = on_two_ranks((20, 12), 2)
    alone = ParallelHeadsLinear.from_linear(
        linear_of((20, 12), bias=True), heads=2, rank=3, alpha=6.0, across_ranks=True
    )
    alone.place_(0, 1)
    assert not alone.rank_local()
    alone.load_state_dict(whole.state_dict())
    assert torch.equal(alone.dense_weight(), whole.dense_weight())
    fixed = ParallelHeadsLinear.from_linear(linear_of((20, 12), bias=True), heads=2, rank=3)
    fixed.place_(1, 2)
    assert not fixed.rank_local()
    with pytest.raises(RuntimeError, match="size mismatch"):
        fixed.load_state_dict(whole.state_dict())


def test_a_batch_that_cannot_be_cut_is_refused_before_the_run_and_in_it() -> None:
    layer = built((20, 12), heads=4)
    with pytest.raises(ValueError, match="a batch of 6 rows cannot be cut into equal parts for 4 heads"):
        layer(torch.zeros(6, 2, 12, dtype=torch.float64))
    layer.eval()(torch.zeros(6, 2, 12, dtype=torch.float64))
    words = ["recipe=null", "strategy=lte"]
    with pytest.raises(UserError, match=r"trainer\.batch_size=6: cannot be cut .* such as 8"):
        compose([*words, "trainer.batch_size=6"])
    compose([*words, "trainer.batch_size=8"])
    compose([*words, "trainer.batch_size=6", "strategy.weights.heads=3"])
    with pytest.raises(ValueError, match=r"strategy\.weights\.heads is 0"):
        ParallelHeadsLinear.from_linear(linear_of((20, 12)), heads=0)


def test_the_shared_row_of_the_table_merges() -> None:
    """The row that the shared tests run over goes through three merges; its W is no longer the first."""
    method = next(method for method in METHODS if method.name == "lte")
    model, strategy = Toy(), method.strategy()
    strategy.prepare(model)
    before = copy.deepcopy(model.state_dict())
    train(model, strategy, strategy.optimizer(model, lr=0.02), range(1, 13))
    assert not torch.equal(before["tall.weight"], model.get_submodule("tall").weight)
    assert torch.equal(model.get_submodule("tall").merged_B, model.get_submodule("tall").lora_B)
