"""WeLore: which layers become factors, with which ranks, what is trained, and checkpoints in either form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank_train.nn.reparam import layers_of
from lowrank_train.nn.welore import WeLore, WeLoreLinear
from lowrank_train.strategy import Strategy
from tests.nn.methods import ADAMW, Method, Toy, train, weights


def spectra() -> dict[str, torch.Tensor]:
    """One that falls off fast, one that hardly does, one in between."""
    steps = torch.arange(10, dtype=torch.float64)
    return {"fast": 0.4**steps, "flat": 1 - 0.01 * steps, "between": 1 / (1 + steps)}


def test_one_threshold_for_all_layers() -> None:
    """By hand at tau = 0.15: z of `fast` is (1, .4, .16, ...), all of `flat` is linear from 1 to 0, 1/(1+i) shifted."""
    ranks = WeLore(tau=0.15).ranks(spectra())
    z = {name: (values - values[-1]) / (values[0] - values[-1]) for name, values in spectra().items()}
    assert ranks == {name: int((values >= 0.15).sum()) for name, values in z.items()}
    assert ranks == {"fast": 3, "flat": 8, "between": 4}
    for share in (0.4, 0.5, 0.7):
        found = WeLore(rank_reduction=share).ranks(spectra())
        dropped = sum(1 - rank / 10 for rank in found.values()) / 3
        assert abs(dropped - share) <= 1 / 30 + 1e-9  # one value of one of the three layers
        assert found["fast"] < found["between"] < found["flat"]


def decaying(model: Toy) -> Toy:
    """`tall` and `wide` with a spectrum that halves, `square` with a flat one."""
    for name, rate in (("tall", 0.5), ("wide", 0.5), ("square", 0.99)):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        left, _, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        weight.data = left * rate ** torch.arange(left.shape[1], dtype=weight.dtype) @ right
    return model


def strategy(**options: object) -> Strategy:
    method = Method("welore", weights("welore.WeLore", **options))
    return method.strategy(select=["*.A", "*.B", "norm.*"], inner=ADAMW, freeze_rest=True)


def test_layers_of_low_rank_are_trained_and_the_others_frozen() -> None:
    model = decaying(Toy(torch.float64))
    plain = copy.deepcopy(model)
    ours = strategy(tau=0.1)
    ours.prepare(model)
    layers = layers_of(model)
    assert {name: layer.weight is None for name, layer in layers.items()} == {
        "tall": True,
        "square": False,
        "wide": True,
    }
    for name in ("tall", "wide"):  # of values 1, 1/2, 1/4, ... those from 0.1 of the largest on: four
        original = plain.get_submodule(name).weight
        left, values, right = torch.linalg.svd(original, full_matrices=False)
        best = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(layers[name].dense_weight(), best, atol=1e-12, rtol=0)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, ours, ours.optimizer(model, lr=0.01), range(1, 4))
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {"tall.A", "tall.B", "wide.A", "wide.B", "norm.weight", "norm.bias"}


def test_a_checkpoint_brings_its_form_along() -> None:
    """Into a model built on meta, where every layer counts with the mean rank, and into one of other numbers."""
    model = decaying(Toy())
    strategy(tau=0.1).prepare(model)
    state = model.state_dict()
    with torch.device("meta"):
        empty = Toy()
    strategy(rank_reduction=0.7).prepare(empty)
    assert [layer.weight is None for layer in layers_of(empty).values()] == [True, True, True]
    empty.to_empty(device="cpu")
    other = Toy()
    strategy(rank_reduction=0.5).prepare(other)
    for fresh in (empty, other):
        fresh.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
        trained = {name for name, param in fresh.named_parameters() if param.requires_grad and "." in name[4:]}
        assert "square.weight" not in trained
        for name, layer in layers_of(fresh).items():
            assert torch.equal(layer.dense_weight(), layers_of(model)[name].dense_weight())


def test_wrong_options_and_a_layer_alone() -> None:
    for options, fault in (({"rank_reduction": 1.0}, "rank_reduction is 1.0"), ({"tau": 1.0}, "tau is 1.0")):
        with pytest.raises(ValueError, match=fault):
            WeLore(**options)
    layer = WeLoreLinear.from_linear(nn.Linear(12, 20, bias=False), tau=0.0)
    assert isinstance(layer, WeLoreLinear) and layer.weight is not None  # nothing dropped: no smaller as factors
