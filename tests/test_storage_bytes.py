"""Bytes of state in every storage under every strategy: counted beforehand, held by a real run, and by the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_train.config import paths
from lowrank_train.config.files import load_container
from lowrank_train.config.paths import group_choices
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.subspace.dense import DenseBasis
from lowrank_train.strategy import Strategy
from tests.test_strategies import STRATEGIES, Toy, configured, small

TINY = {"min_elements": 20, "block": 32, "block_q4": 16}  # for tensors of 24 to 240 numbers, norms of 12 left out
PIECES = {"first": "q4", "second": "q8", "other": "bf16", "basis": "q4"}
STORAGES = [*group_choices()["strategy/storage"], "pieces"]


def storage(name: str) -> dict[str, Any]:
    """A choice of the axis, or one format a piece, for tensors as small as the toy's."""
    return load_container(paths.CONF / "strategy" / "storage" / f"{'fp32' if name == 'pieces' else name}.yaml") | {
        **TINY,
        **(PIECES if name == "pieces" else {}),
    }


def optimizer_of(name: str, chosen: dict[str, Any], device: str) -> tuple[Strategy, Toy, TransformOptimizer]:
    strategy = Strategy.from_config(small(configured(name), storage=chosen), seed=1)
    torch.manual_seed(0)
    with torch.device(device):
        model = Toy()
        strategy.prepare(model)
    return strategy, model, strategy.optimizer(model, lr=1e-2)


def held_bytes(optimizer: TransformOptimizer) -> int:
    """Of the memory behind all state tensors and kept weights, each piece of it once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors += optimizer.previous.kept.values()
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in memory.items() if pointer)


def update(model: Toy, optimizer: TransformOptimizer) -> None:
    tokens = torch.randint(17, (4, 8), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


WAYS_OUT: dict[str, tuple[str, Any]] = {
    "strategy.storage.first=fp32": ("first", "fp32"),
    "strategy.storage.basis=null": ("basis", None),
}


Built = tuple[Strategy, Toy, TransformOptimizer]


def allowed(name: str, part: dict[str, Any]) -> tuple[dict[str, Any], Built]:
    """The storage, changed as the refusal says where a moment has to be read, or there is no basis to be coded.

    And what was built with it without memory.
    """
    try:
        return part, optimizer_of(name, part, "meta")
    except ValueError as error:
        key, value = next(change for words, change in WAYS_OUT.items() if words in str(error))
        if part[key] == value:
            raise
        return allowed(name, part | {key: value})


def cases() -> list[tuple[str, str]]:
    """Every strategy in every storage; of those that differ in their matrices' form alone, all but one in two.

    Which layers welore factorises follows from numbers, of which meta has none: it counts with the mean rank.
    """
    found, seen = [], []
    for number, name in enumerate(name for name in STRATEGIES if name != "welore"):
        rules = {key: value for key, value in vars(configured(name)).items() if key not in ("name", "weights", "merge")}
        again = configured(name).weights is not None and rules in seen
        seen.append(rules)
        found += [(name, chosen) for chosen in ([STORAGES[number % len(STORAGES)], "pieces"] if again else STORAGES)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("name", "chosen"), cases())
def test_bytes_held_are_bytes_counted(name: str, chosen: str) -> None:
    """After a real update, to the byte."""
    part, (strategy, planned, counting) = allowed(name, storage(chosen))
    counting.initialize()
    counted = counting.state_bytes()
    shared = counted.pop("shared", 0)
    assert sum(row.state_bytes for row in strategy.assignment(planned)) == sum(counted.values())
    _, model, optimizer = optimizer_of(name, part, "cpu")
    update(model, optimizer)
    for param in optimizer.slots:  # what had no gradient yet
        optimizer._state(param)
    assert optimizer.state_bytes() == counted | ({"shared": shared} if shared else {})
    assert held_bytes(optimizer) == sum(counted.values())
    assert all(param.isfinite().all() for param in model.parameters())


BYTES = {
    "fp32": lambda n: 4 * n,
    "bf16": lambda n: 2 * n,
    "q8": lambda n: n + 4 * -(-n // 32),
    "q8_linear": lambda n: n + 4 * -(-n // 32),
    "q4": lambda n: -(-n // 2) + 4 * -(-n // 16),
}


@pytest.mark.parametrize("first", BYTES)
@pytest.mark.parametrize("second", BYTES)
def test_bytes_of_adam_are_the_formula(first: str, second: str) -> None:
    """Two moments a number, each by its own format, whole in tensors of fewer numbers than min_elements."""
    _, model, optimizer = optimizer_of("full", storage("fp32") | {"first": first, "second": second}, "cpu")
    update(model, optimizer)
    expected = 0
    for param in model.parameters():
        formats = (first, second) if param.numel() >= TINY["min_elements"] else ("fp32", "fp32")
        expected += sum(BYTES[fmt](param.numel()) for fmt in formats)
    assert held_bytes(optimizer) == expected


@pytest.mark.parametrize("name", ["galore", "fira", "gradnormlorp"])
def test_bytes_of_a_basis_are_the_formula(name: str) -> None:
    """In each of its formats: rank numbers a line, and where it is in codes 5 bytes for each group of 256."""
    for fmt, of_numbers in {
        "fp32": lambda n: 4 * n,
        "bf16": lambda n: 2 * n,
        "q8": lambda n: n + 5,
        "q4": lambda n: -(-n // 2) + 5,
    }.items():
        strategy, model, optimizer = optimizer_of(name, storage("q8") | {"basis": fmt}, "cpu")
        assert strategy.selected is not None and isinstance(strategy.selected.subspace, DenseBasis)  # type: ignore[attr-defined]
        update(model, optimizer)
        lines = [min(param.shape) for row, param in model.named_parameters() if "_proj" in row]
        assert optimizer.state_bytes()["basis"] == sum(of_numbers(3 * length) for length in lines), fmt
