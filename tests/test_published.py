"""The library entry point: selection, option names, defaults, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.optim.transform import tensor_of
from lowrank_train.published import METHODS, optimizer

NAMED = [
    *("galore", "galore_adafactor", "galore_8bit", "fira", "fira_rmsprop", "frugal", "frugal_coord", "frugal_block"),
    *("frugal_lion", "frugal_sgd", "online_subspace", "online_subspace_lion", "natural_galore", "galore_plus"),
    *("dct_adamw", "flora", "apollo", "ldadam", "gradnormlorp", "badam", "q_galore"),
]
"""What must be there under these names."""


class Model(nn.Module):
    """An embedding, a norm whose name has `attention` in it, and two linears of a block."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(20, 12)
        block = {
            "self_attn": nn.Linear(12, 12, bias=False),
            "mlp": nn.Linear(12, 24),
            "post_attention_layernorm": nn.LayerNorm(12),
        }
        self.layers = nn.ModuleList([nn.ModuleDict(block)])
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        block: Any = self.layers[0]
        hidden = block["post_attention_layernorm"](block["self_attn"](self.embed(tokens)))
        loss: Tensor = block["mlp"](hidden).square().mean()
        return loss

    @property
    def mlp_weight(self) -> nn.Parameter:
        return dict(self.named_parameters())["layers.0.mlp.weight"]


def steps(model: Model, optim: torch.optim.Optimizer, updates: int = 3) -> list[float]:
    losses = []
    for update in range(updates):
        loss = model((torch.arange(16) * (update + 3)) % 20)
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    return losses


def names(optim: torch.optim.Optimizer, group: str) -> list[str]:
    return [name for entry in optim.param_groups if entry["name"] == group for name in entry["param_names"]]


def fitting_options(method: str) -> dict[str, Any]:
    """For a model as small as this: a rank, where the method has one; one layer of one."""
    needed: dict[str, dict[str, Any]] = {"lisa": {"lisa_activated_layers": 1}, "library": {"name": "NAdam"}}
    if method in needed:
        return needed[method]
    small: dict[str, Any] = {"rank": 3}
    try:
        optimizer(method, Model(), lr=1e-3, **small)
    except ValueError:
        return {}
    return small


@pytest.mark.parametrize("method", sorted({*METHODS, *NAMED}))
def test_every_method_trains_a_model(method: str) -> None:
    """With our defaults; the loss goes down on the same tokens."""
    model = Model()
    optim = optimizer(method, model, lr=1e-3, **fitting_options(method))
    assert isinstance(optim, torch.optim.Optimizer)
    tokens = torch.arange(20)
    losses = []
    for _ in range(4):
        loss = model(tokens)
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_model_and_its_pairs_are_the_same() -> None:
    first, second = Model(), Model()
    one = steps(first, lowrank_train.optimizer("galore", first, lr=0.01, rank=4))
    other = steps(second, lowrank_train.optimizer("galore", list(second.named_parameters()), lr=0.01, rank=4))
    assert one == other


def test_by_default_the_matrices_of_attention_and_mlp_are_projected() -> None:
    """The norm after the attention and the bias of the MLP have fitting names but are vectors."""
    optim = optimizer("galore", Model(), lr=0.01, rank=4)
    assert names(optim, "projected") == ["layers.0.self_attn.weight", "layers.0.mlp.weight"]
    assert len(names(optim, "rest")) == 4


def test_where_no_name_tells_them_apart_every_matrix_is_projected() -> None:
    pairs = [("W", nn.Parameter(torch.ones(6, 4))), ("b", nn.Parameter(torch.ones(4)))]
    assert names(optimizer("galore", pairs, lr=0.01, rank=2), "projected") == ["W"]


@pytest.mark.parametrize("project", [["layers.0.mlp.weight"], ["*.mlp.*eight"]])
def test_names_and_patterns(project: list[str]) -> None:
    assert names(optimizer("fira", Model(), lr=0.01, rank=4, project=project), "projected") == ["layers.0.mlp.weight"]


def test_nothing_projected_is_the_rule_for_the_rest() -> None:
    model = Model()
    optim = optimizer("galore", model, lr=0.01, project=[])
    assert names(optim, "projected") == [] and len(names(optim, "rest")) == len(list(model.parameters()))


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "method": ("galor", {}, "did you mean galore"),
    "option": ("galore", {"update_proj_gpa": 3}, "did you mean update_proj_gap"),
    "option of another method": ("apollo", {"density": 0.5}, "has no option 'density'"),
    "pattern": ("galore", {"project": ["*.mlpp.weight"]}, "nearest: layers.0.mlp.weight"),
    "vector": ("galore", {"project": ["layers.0.mlp.bias"], "rank": 2}, "only matrices"),
    "rank 0": ("galore", {"rank": 0}, r"^rank is 0; it must be at least 1"),
    "rank too large": ("galore", {"rank": 13}, r"layers.0.self_attn.weight of shape \(12, 12\): rank is 13"),
    "gap 0": ("fira", {"update_proj_gap": 0, "rank": 2}, "it must be at least 1"),
    "side": ("galore", {"proj_type": "standard"}, "proj_type is 'standard'; it must be one of std, reverse_std"),
    "coordinates": ("frugal_coord", {"coord_choice": "diagonal"}, "must be one of columns, rows, randk"),
    "inactive rule": ("frugal", {"inactive_update_rule": "adam"}, "must be one of sign_sgd, sgd, no"),
    "own learning rate": ("flora", {"relative_step": True}, "give lr"),
    "no basis": ("adamw", {"basis_source": lambda name, update, grad: None}, "no basis that could be supplied"),
    "moment of stepping": ("fira", {"when": "project_in_backward", "rank": 2}, "uses what the subspace left out"),
}


@pytest.mark.parametrize(("method", "options", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_say_what_is_wrong(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(method, Model(), lr=0.01, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("galore", {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "proj_type": "std", "scale": 0.25}),
        ("frugal", {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "density": 0.25, "proj_side": "std"}),
        ("ldadam", {"betas": (0.908, 0.99), "rho": 0.908, "eps": 1e-8, "error_feedback": True}),
        ("dct_adamw", {"update_proj_gap": 1, "rotate_subspace": False, "ell_norm": 1, "sim_type": "matmul", "rank": 8}),
        ("flora", {"beta1": None, "kappa": 1000, "scale_parameter": True, "decay_rate": -0.8}),
        ("galore_adafactor", {"scale_parameter": True, "beta1": None, "clip_threshold": 1.0}),
    ],
)
def test_published_defaults(method: str, options: dict[str, Any]) -> None:
    """An option left out is what the published code makes of it."""
    small: dict[str, Any] = {} if method == "frugal" else {"rank": 8}
    first, second = Model(), Model()
    one = steps(first, optimizer(method, first, lr=0.01, published=True, **small))
    other = steps(second, optimizer(method, second, lr=0.01, published=True, **(small | options)))
    assert one == other


def test_learning_rate_of_the_basis_follows_the_one_of_the_constructor() -> None:
    """Online Subspace Descent measures the rate of its basis by the rate it was built with, not by the present one."""
    bases = []
    for lr, constructor_lr in ((0.01, None), (0.5, 0.01)):
        model = Model()
        optim = optimizer("online_subspace", model, lr=lr, rank=3, published=True, constructor_lr=constructor_lr)
        for group in optim.param_groups:
            group["lr"] = 0.01
        steps(model, optim, 4)
        bases.append(tensor_of(optim.state[model.mlp_weight], "basis_right").clone())
    torch.testing.assert_close(*bases, rtol=0, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_frugal_sgd_as_published(nesterov: bool) -> None:
    """After every reset its momentum starts at the gradient of that update, and then takes it in once more."""
    weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    optim = optimizer(
        "frugal_sgd",
        [("mlp.weight", weight)],
        lr=0.1,
        published=True,
        density=0.5,
        update_gap=3,
        momentum=0.5,
        nesterov=nesterov,
        inactive_update_rule="sgd",
        inactive_lr_scale=2.0,
        basis_source=lambda name, update, grad: torch.eye(6, dtype=torch.float64)[update // 3 : update // 3 + 3],
    )
    expected, buffer = torch.zeros(8, 6, dtype=torch.float64), torch.zeros(0)
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 8):
        grad = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        weight.grad = grad.clone()
        optim.step()
        first = (update - 1) // 3  # bases are asked for at updates 1, 4 and 7
        inside = slice((1 + 3 * first) // 3, (1 + 3 * first) // 3 + 3)
        if (update - 1) % 3 == 0:
            buffer = grad[:, inside].clone()
        buffer = 0.5 * buffer + grad[:, inside]
        direction = 2.0 * grad
        direction[:, inside] = grad[:, inside] + 0.5 * buffer if nesterov else buffer
        expected -= 0.1 * direction
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_flora_without_a_rank_keeps_a_whole_first_moment() -> None:
    """The published default."""
    model = Model()
    optim = optimizer("flora", model, lr=0.01, published=True, beta1=0.9)
    steps(model, optim)
    assert tensor_of(optim.state[model.mlp_weight], "exp_avg").shape == (24, 12)


def test_accumulation_takes_the_memory_of_the_subspace() -> None:
    """Between micro-batches there is no full gradient, only the small sum of projected ones."""
    model = Model()
    optim = optimizer("flora_accum", model, lr=0.01, rank=2, accumulation=3, beta1=None)
    for micro_batch in range(3):
        (model(torch.arange(8) + micro_batch) / 3).backward()
        assert model.mlp_weight.grad is None
    before = model.mlp_weight.detach().clone()
    optim.step()
    assert not torch.equal(before, model.mlp_weight)
