"""Full-size rules through the library entry point, beside torch's and transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

import lowrank_train


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def trained(build: Callable[[nn.Module], list[torch.optim.Optimizer]], updates: int = 10) -> Tensor:
    trainee = model()
    optimizers = build(trainee)
    for update in range(updates):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(update), dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (trainee(inputs) - inputs[:, :4].sin()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return torch.cat([param.detach().flatten() for param in trainee.parameters()])


def ours(method: str, **options: Any) -> Tensor:
    return trained(lambda trainee: [lowrank_train.optimizer(method, trainee, lr=1e-2, **options)])


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "adamw": (
        {"betas": (0.8, 0.9), "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1),
    ),
    "sgd": (
        {"momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    ),
    "adafactor": (
        {"beta1": 0.9, "scale_parameter": True},
        lambda p: Adafactor(p, lr=1e-2, relative_step=False, beta1=0.9, scale_parameter=True),
    ),
    "library": (
        {"name": "nadam", "momentum_decay": 0.01},
        lambda p: torch.optim.NAdam(p, lr=1e-2, momentum_decay=0.01),
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_it_is_the_library_optimizer(method: str) -> None:
    options, theirs = CASES[method]
    expected = trained(lambda trainee: [theirs(trainee.parameters())])
    torch.testing.assert_close(ours(method, **options), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("published", "adjust"), [(True, "original"), (False, "match_rms_adamw")])
def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest(
    published: bool, adjust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch rounds its iteration to bfloat16 after a sum in another order; to that rounding the runs agree."""

    def theirs(trainee: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [param for param in trainee.parameters() if param.ndim == 2]
        vectors = [param for param in trainee.parameters() if param.ndim == 1]
        muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn=adjust)
        return [muon, torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.1)]

    start = trained(theirs, updates=0)
    expected, other = trained(theirs), ours("muon", published=not published)
    error = (ours("muon", published=published) - expected).norm() / (expected - start).norm()
    assert error < 2e-2 < (other - expected).norm() / (expected - start).norm()


def test_lion_and_auon_follow_their_options() -> None:
    assert not torch.equal(ours("lion"), ours("lion", betas=(0.5, 0.9)))
    assert not torch.equal(ours("auon", form="paper"), ours("auon", form="code"))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("muon", {"adjust_lr_fn": "moonshot"}, "adjust_lr_fn is 'moonshot'"),
        ("muon", {"ns_coefficients": (2, -1.5, 0.5)}, "ns_coefficients"),
        ("muon", {"ns_step": 5}, "did you mean ns_steps"),
        ("library", {}, "needs name"),
        ("library", {"name": "NAdam", "momentum_decy": 1}, "Did you mean momentum_decay"),
        ("adafactor", {"relative_step": True}, "relative_step makes the rule choose"),
    ],
)
def test_what_is_refused(method: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        lowrank_train.optimizer(method, model(), lr=1e-2, **options)
