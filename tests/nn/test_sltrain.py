"""SLTrain's layer: its support, its start, its counts at the published sizes; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_train.config import compose
from lowrank_train.config.checks import world_size
from lowrank_train.models import meta_model
from lowrank_train.nn.reparam import layers_of
from lowrank_train.nn.sltrain import SLTrain, SLTrainLinear, random_support
from lowrank_train.strategy import Strategy

# Size, rank, share; then millions of parameters and gigabytes (weights and two moments in bfloat16, an index of 8
# bytes an entry): the closed forms P = rest + sum r (m + n) + int(share m n) and 6 P + 8 nnz.
PUBLISHED_COUNTS = [
    ("llama_60m", 128, 0.03, 43.53, 0.267),
    ("llama_130m", 256, 0.03, 96.55, 0.600),
    ("llama_350m", 256, 0.03, 194.29, 1.238),
    ("llama_1b", 512, 0.03, 645.55, 4.163),
    ("llama_7b", 1024, 0.05, 3144.74, 21.46),
]


def layer_of(shape: tuple[int, int], *, name: str = "", seed: int = 0, **options: object) -> SLTrainLinear:
    layer = SLTrainLinear.from_linear(nn.Linear(shape[1], shape[0]), name=name, seed=seed, **options)
    assert isinstance(layer, SLTrainLinear)
    return layer


@pytest.mark.parametrize("total, count", [(1000, 30), (1000, 500), (1000, 501), (1000, 999), (7, 7), (1, 1), (5, 0)])
def test_support_has_exactly_the_entries_asked_for(total: int, count: int) -> None:
    support = random_support(total, count, torch.Generator().manual_seed(1))
    assert support.dtype == torch.int64
    assert len(support) == count
    assert (support[1:] > support[:-1]).all()
    assert count == 0 or (support[0] >= 0 and support[-1] < total)


@pytest.mark.parametrize("total, count", [(6, 2), (6, 4), (5, 1)])
def test_every_support_is_equally_likely(total: int, count: int) -> None:
    """Chi-square of 6000 draws over all subsets; 40 is beyond the 99.9 % quantile (36.1 at 14 degrees of freedom)."""
    generator, draws = torch.Generator().manual_seed(0), 6000
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        drawn = tuple(random_support(total, count, generator).tolist())
        seen[drawn] = seen.get(drawn, 0) + 1
    subsets = len(list(torch.combinations(torch.arange(total), count)))
    expected = draws / subsets
    assert len(seen) == subsets
    assert sum((times - expected) ** 2 / expected for times in seen.values()) < 40


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64), (33, 17)])
def test_starts_as_the_sparse_part_alone(shape: tuple[int, int]) -> None:
    """Entries uniform in +-1/sqrt(n): variance 1/(3n), so that W has sp_ratio/(3n); 20 % for a few hundred draws."""
    layer = layer_of(shape, rank=8, sp_ratio=0.5)
    rows, columns = shape
    assert torch.equal(layer.lora_B, torch.zeros(rows, 8))
    assert tuple(layer.lora_A.shape) == (8, columns)
    weight = layer.dense_weight()
    assert int((weight != 0).sum()) == len(layer.sparse_value) == int(0.5 * rows * columns)
    assert torch.equal(weight.flatten()[layer.sparse_index.long()], layer.sparse_value)
    for values in (layer.sparse_value, layer.lora_A):
        assert values.abs().max() <= columns**-0.5
        assert values.detach().var().item() * 3 * columns == pytest.approx(1, rel=0.2)


def test_the_scale_multiplies_the_product_alone() -> None:
    layer = layer_of((20, 12), rank=4, alpha=2.0, sp_ratio=0.1)
    with torch.no_grad():
        layer.lora_B.normal_()
    sparse = torch.zeros(240).scatter(0, layer.sparse_index.long(), layer.sparse_value.detach()).view(20, 12)
    torch.testing.assert_close(layer.dense_weight(), 0.5 * layer.lora_B @ layer.lora_A + sparse)
    trained = layer_of((20, 12), rank=4, alpha=2.0, sp_ratio=0.1, trainable_scaling=True)
    trained.load_state_dict(layer.state_dict() | {"scaling": torch.tensor([0.3])})
    expected = torch.tensor(0.3).tanh() * layer.lora_B @ layer.lora_A + sparse
    torch.testing.assert_close(trained.dense_weight(), expected)


def test_dense_weight_is_differentiable_as_the_layer_is() -> None:
    """The gradients of the layer are those of plain autograd through its dense weight; float64 to rounding."""
    layer = layer_of((14, 9), rank=3, sp_ratio=0.3, trainable_scaling=True).double()
    with torch.no_grad():
        layer.lora_B.normal_()
    x, toward = torch.randn(30, 9, dtype=torch.float64), torch.randn(30, 14, dtype=torch.float64)
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(layer(x), parameters, toward)
    plain = torch.autograd.grad(nn.functional.linear(x, layer.dense_weight(), layer.bias), parameters, toward)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_support_and_start_follow_from_seed_and_name() -> None:
    one = layer_of((40, 30), rank=4, name="layers.0.q", seed=3).state_dict()
    again = layer_of((40, 30), rank=4, name="layers.0.q", seed=3).state_dict()
    elsewhere = [("layers.1.q", 3), ("layers.0.q", 4)]
    others = [layer_of((40, 30), rank=4, name=name, seed=seed).state_dict() for name, seed in elsewhere]
    for name in ("lora_A", "sparse_value", "sparse_index"):
        assert torch.equal(one[name], again[name])
        assert not any(torch.equal(one[name], other[name]) for other in others)


def test_index_has_four_bytes_below_two_to_the_31_and_stays_whole() -> None:
    assert layer_of((40, 30), rank=4).to(torch.bfloat16).sparse_index.dtype == torch.int32
    with torch.device("meta"):
        small, large = nn.Linear(32767, 65536), nn.Linear(32768, 65536)  # one row below 2^31, and 2^31
    assert SLTrainLinear.from_linear(small).sparse_index.dtype == torch.int32
    assert SLTrainLinear.from_linear(large).sparse_index.dtype == torch.int64


def test_only_factors_and_entries_are_trained_and_the_old_weight_is_gone() -> None:
    linear = nn.Linear(30, 40)
    layer = SLTrainLinear.from_linear(linear, rank=4)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == dict.fromkeys(
        ("bias", "lora_A", "lora_B", "sparse_value"), True
    )
    assert layer.bias is linear.bias
    assert set(layer.state_dict()) == {"bias", "lora_A", "lora_B", "sparse_value", "sparse_index"}


@pytest.mark.parametrize("size, rank, share, millions, gigabytes", PUBLISHED_COUNTS)
def test_counts_are_the_closed_forms(size: str, rank: int, share: float, millions: float, gigabytes: float) -> None:
    """Counted on meta, to the parameter; the sheet of figures above to the digits that it has."""
    plain = meta_model(compose([f"model={size}"]).model, vocab_size=32000, dtype=torch.bfloat16)
    model = meta_model(compose([f"model={size}"]).model, vocab_size=32000, dtype=torch.bfloat16)
    words = [f"strategy.weights.rank={rank}", f"strategy.weights.sp_ratio={share}"]
    config = compose([f"model={size}", "strategy=sltrain", *words])
    Strategy.from_config(config.strategy).prepare(model)
    shapes = [p.shape for n, p in plain.named_parameters() if "self_attn" in n or "mlp" in n]
    others = sum(p.numel() for p in plain.parameters()) - sum(shape.numel() for shape in shapes)
    entries = sum(int(share * m * n) for m, n in shapes)
    layers = layers_of(model)
    assert len(layers) == len(shapes)
    assert sum(p.numel() for p in model.parameters()) == others + sum(rank * (m + n) for m, n in shapes) + entries
    assert sum(layer.get_buffer("sparse_index").numel() for layer in layers.values()) == entries
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e6 == pytest.approx(millions, abs=0.005)
    half_unit = 0.5 * 10 ** -(2 if gigabytes > 10 else 3)
    assert (6 * total + 8 * entries) / 1e9 == pytest.approx(gigabytes, abs=half_unit)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "strategy.weights.rank is 0"),
        ({"sp_ratio": 0.0}, "strategy.weights.sp_ratio is 0.0"),
        ({"sp_ratio": 1.5}, "strategy.weights.sp_ratio is 1.5"),
        ({"alpha": 0.0}, "strategy.weights.alpha is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLTrain(**options)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rank is 9, above the short side of 20 x 8"):
        layer_of((20, 8), rank=9)
    with pytest.raises(ValueError, match="leaves no entry of 4 x 4"):
        layer_of((4, 4), rank=2, sp_ratio=0.03)


# Of the authors' scripts: updates, warm-up, rank, share, alpha, clip, rows in a micro-batch, devices
PUBLISHED_RUNS = {
    "sltrain_60m": (11_000, 1_100, 128, 0.03, 32, None, 256, 1),
    "sltrain_130m": (22_000, 2_200, 256, 0.03, 16, None, 256, 1),
    "sltrain_350m": (65_000, 6_500, 256, 0.03, 16, None, 128, 4),
    "sltrain_1b": (140_000, 10_000, 512, 0.03, 8, None, 32, 8),
    "sltrain_7b": (150_000, 15_000, 1024, 0.05, 8, 1.0, 8, 8),
}


@pytest.mark.parametrize("name", PUBLISHED_RUNS)
def test_recipes_have_the_published_hyperparameters(name: str) -> None:
    config = compose([f"recipe={name}"])
    steps, warmup, rank, share, alpha, clip, rows, devices = PUBLISHED_RUNS[name]
    weights, rest = config.strategy.weights, config.strategy.rest
    assert weights is not None
    assert (weights["rank"], weights["sp_ratio"], weights["alpha"]) == (rank, share, alpha)
    assert not weights["trainable_scaling"]
    assert (config.trainer.steps, config.optim.warmup_steps) == (steps, warmup)
    assert (config.trainer.batch_size, config.trainer.total_batch_size, world_size(config)) == (rows, 512, devices)
    assert (config.optim.lr, config.optim.grad_clip, config.optim.weight_decay) == (0.003, clip, 0)
    assert (config.optim.schedule, config.optim.min_lr_ratio) == ("cosine", 0.1)
    assert (rest["_target_"], rest["betas"]) == ("lowrank_train.optim.moments.Adam", (0.9, 0.999))
    assert (config.strategy.storage is not None) == (name == "sltrain_7b")
    assert (config.data.name, config.data.packing, config.data.seq_len) == ("c4", "pad", 256)
    assert config.precision.name == "bf16"
