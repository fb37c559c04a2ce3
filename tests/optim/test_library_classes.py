"""What is observed of a library's optimizer class, which classes are no rule for one tensor, and state made flat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.optim.library import Library
from lowrank_train.optim.library_classes import CannotBeRun, checked_arguments, class_of, observe
from lowrank_train.optim.library_state import flatten, unflatten


@pytest.mark.parametrize(
    ("name", "options", "reads_weights", "proportional"),
    [
        ("AdamW", {}, False, True),
        ("adamw", {"weight_decay": 0.1}, True, False),  # its own decay, unlike optim.weight_decay, is part of the rule
        ("SGD", {"momentum": 0.9}, False, True),
        ("Rprop", {}, False, False),
        ("Adafactor", {}, True, False),
        ("Muon", {}, False, True),
    ],
)
def test_what_is_observed(name: str, options: dict[str, Any], reads_weights: bool, proportional: bool) -> None:
    cls = class_of(name)
    traits = observe(cls, checked_arguments(cls, options))
    assert (traits.reads_weights, traits.proportional_to_lr) == (reads_weights, proportional)


@pytest.mark.parametrize(
    ("name", "reads_weights"),
    [("AdaBelief", False), ("AdamP", True), ("SGDP", True), ("Lamb", True), ("LARS", True), ("Ranger", True)],
)
def test_what_is_observed_of_the_package(name: str, reads_weights: bool) -> None:
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    assert Library(name).reads_weights == reads_weights


@pytest.mark.parametrize(("name", "reason"), [("MADGRAD", "keeps k"), ("Prodigy", "d_hat"), ("SAM", "not built from")])
def test_what_is_refused_of_the_package(name: str, reason: str) -> None:
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    with pytest.raises(ValueError, match=reason):
        Library(name)


class Strange(torch.optim.SGD):
    """SGD, and something that a rule for one tensor cannot be."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.strange(self.param_groups[0])
        return super().step(closure)

    def strange(self, group: dict[str, Any]) -> None:
        raise NotImplementedError


class Hidden(Strange):
    def strange(self, group: dict[str, Any]) -> None:
        self.count += 1


class Random(Strange):
    def strange(self, group: dict[str, Any]) -> None:
        group["params"][0].grad.add_(torch.randn(()))


class Coupled(Strange):
    def strange(self, group: dict[str, Any]) -> None:
        norm = torch.stack([param.grad.norm() for param in group["params"]]).norm()
        for param in group["params"]:
            param.grad.div_(norm)


class Remembering(Strange):
    def strange(self, group: dict[str, Any]) -> None:
        group["total"] = group.get("total", 0.0) + sum(param.grad.norm().item() for param in group["params"])


class WithAnObject(Strange):
    def strange(self, group: dict[str, Any]) -> None:
        self.state[group["params"][0]]["projector"] = object()


class Failing(Strange):
    def strange(self, group: dict[str, Any]) -> None:
        raise RuntimeError("needs a Hessian")


class Averaging(Hidden):
    def train(self) -> None: ...
    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Hidden, "keeps count outside the state of its tensors"),
        (Random, "draws random numbers"),
        (Coupled, "couples all tensors"),
        (Remembering, r"couples all tensors of a group by a common number \(total\)"),
        (WithAnObject, "cannot be stored safely: projector is a object"),
        (Failing, "RuntimeError: needs a Hessian"),
        (Averaging, "other weights than those that are to be evaluated"),
    ],
)
def test_what_is_no_rule_for_a_tensor_is_refused(cls: type[torch.optim.Optimizer], reason: str) -> None:
    with pytest.raises(CannotBeRun, match=reason):
        observe(cls, {})


def test_nested_state_survives_being_flat() -> None:
    value = {"a": torch.ones(2), "b": [torch.zeros(1), [], (1, 2.5)], "c": {"d": True, "e": None}, "f": {}, "g": 3}
    flat = flatten(value, "rule")
    assert all(isinstance(item, Tensor | int) for item in flat.values())
    back = unflatten(flat, "rule")
    assert torch.equal(back.pop("a"), torch.ones(2)) and torch.equal(back["b"].pop(0), torch.zeros(1))
    assert back == {"b": [[], (1, 2.5)], "c": {"d": True, "e": None}, "f": {}, "g": 3}
    assert isinstance(back["c"]["d"], bool)
    with pytest.raises(TypeError, match="x is a str"):
        flatten({"x": "text"}, "rule")
