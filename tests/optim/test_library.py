"""Library optimizers as rules: bit for bit the class itself, in whole and in a subspace; storage, resume, refusals."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_train.config import UserError, compose
from lowrank_train.optim.groups import Group
from lowrank_train.optim.library import Library
from lowrank_train.optim.library_classes import checked_arguments, class_of
from lowrank_train.optim.optimizer import TransformOptimizer
from lowrank_train.optim.transform import Rates, Slot, Transform
from tests.optim.methods import in_subspace, optimizer_of, rule, toy_model

SHAPES = [(7, 5), (4, 9), (6, 6), (11,)]  # tall, wide, square, a vector
RATES = Rates(2.0**-7, 2.0**-7)

OF_TORCH: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1, "betas": [0.8, 0.9]}),
    ("Adamax", {}),
    ("NAdam", {"momentum_decay": 1e-2}),
    ("RAdam", {}),
    ("Adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.01}),
    ("RMSprop", {"alpha": 0.9, "momentum": 0.5, "centered": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {}),
    ("Adadelta", {}),
    ("Rprop", {}),
    ("ASGD", {"t0": 2}),
    ("Adafactor", {}),
]
OF_PACKAGE: list[tuple[str, dict[str, Any]]] = [
    ("AdaBelief", {"betas": [0.9, 0.99], "eps": 1e-8}),
    ("DiffGrad", {}),
    ("AdamP", {"delta": 0.5}),
    ("Grams", {}),
    ("SOAP", {"precondition_frequency": 3}),
    ("Lion", {}),
    ("Lamb", {}),
    ("LARS", {"weight_decay": 0.1}),
    ("ADOPT", {}),
    ("AdEMAMix", {"betas": [0.9, 0.99, 0.999]}),
    ("SimplifiedAdEMAMix", {}),
    ("CAME", {}),
    ("QHAdam", {}),
    ("StableAdamW", {"kahan_sum": False}),
    ("SM3", {}),
    ("Shampoo", {}),
    ("Yogi", {}),
    ("Ranger", {}),
    ("AdaBound", {}),
]


def ids(case: Any) -> str:
    return f"{case[0]}{'-' if case[1] else ''}{'-'.join(case[1])}" if isinstance(case[0], str) else str(case)


def optimizer_on(
    transform: Transform, param: nn.Parameter, state_dtype: torch.dtype | None = None
) -> TransformOptimizer:
    group = Group("rest", transform, [("w", param)], [Slot("w", 0, 0.0, state_dtype or param.dtype)])
    return TransformOptimizer([group], lr=2.0**-7)


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, updates: int = 14) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(updates)]


def steps(param: nn.Parameter, optimizer: torch.optim.Optimizer, grads: list[Tensor], first: int = 0) -> Tensor:
    """The weights after the updates, with a learning rate that falls in powers of two."""
    for update, grad in enumerate(grads, first):
        optimizer.param_groups[0]["lr"] = 2.0 ** -(7 + update // 4)
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def of_class(case: tuple[str, dict[str, Any]], param: nn.Parameter) -> torch.optim.Optimizer:
    cls = class_of(case[0])
    return cls([param], lr=2.0**-7, **checked_arguments(cls, case[1]))  # type: ignore[call-arg]


def check_bit_for_bit(case: tuple[str, dict[str, Any]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    start = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    grads = gradients(shape, dtype)
    result = steps(ours, optimizer_on(Library(case[0], case[1]), ours), grads)
    assert torch.equal(result, steps(theirs, of_class(case, theirs), grads))
    assert not torch.equal(result, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", OF_TORCH, ids=ids)
def test_on_a_whole_tensor_it_is_the_class_itself(
    case: tuple[str, dict[str, Any]], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_bit_for_bit(case, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("case", OF_PACKAGE, ids=ids)
def test_on_a_whole_tensor_it_is_the_class_of_the_package(
    case: tuple[str, dict[str, Any]], shape: tuple[int, ...]
) -> None:
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    check_bit_for_bit(case, shape, torch.float32)


def check_direction(case: tuple[str, dict[str, Any]]) -> None:
    """In a subspace the class moves a tensor of zeros; the weights, moved by that direction, are where it brings them.

    A rule that looks at the weights works on a copy of them.
    """
    shape = (7, 5)
    start = torch.linspace(-1, 1, 35, dtype=torch.float64).reshape(shape)
    theirs, ours, library = nn.Parameter(start.clone()), start.clone(), Library(case[0], case[1])
    grads, state = gradients(shape, torch.float64), library.init(ours, Slot("w", 0, 0.0, torch.float64))
    for update, grad in enumerate(grads):
        lr = 2.0 ** -(7 + update // 4)
        kept = grad.clone()
        library.update(grad, state, ours, Rates(lr, 2.0**-7)).add_to_(ours, -lr)
        assert torch.equal(grad, kept), "the lift still needs the gradient"
    torch.testing.assert_close(ours, steps(theirs, of_class(case, theirs), grads), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", OF_TORCH, ids=ids)
def test_the_direction_is_what_the_class_does(case: tuple[str, dict[str, Any]]) -> None:
    check_direction(case)


@pytest.mark.parametrize("case", OF_PACKAGE, ids=ids)
def test_the_direction_is_what_the_class_of_the_package_does(case: tuple[str, dict[str, Any]]) -> None:
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    check_direction(case)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("LBFGS", {}, "computes the loss again"),
        ("SparseAdam", {}, "does not support dense gradients"),
        ("Rpropp", {}, "Did you mean Rprop?"),
        ("AdamW", {"bettas": [0.9, 0.9]}, "AdamW has no option bettas. Did you mean betas?"),
        ("AdamW", {"lr": 1e-3}, "lr is optim.lr"),
        ("AdamW", {"betas": [0.9, 1.9]}, "ValueError: Invalid beta parameter at index 1"),
        ("os.AdamW", {}, "before the dot stands torch.optim or pytorch_optimizer"),
    ],
)
def test_what_is_refused_by_name(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        optimizer_of(in_subspace(rest=rule("library.Library", name=name, **options))(), toy_model())
    assert reason in str(caught.value)


def test_a_rule_that_looks_at_the_weights_is_refused_in_a_subspace_alone() -> None:
    part = rule("library.Library", name="Adafactor")
    with pytest.raises(UserError, match="Library looks at the weights"):
        optimizer_of(in_subspace(inner=part)(), toy_model())
    assert optimizer_of(in_subspace(rest=part)(), toy_model())


def test_a_rule_for_matrices_is_refused_on_vectors() -> None:
    with pytest.raises(UserError, match=r"0\.bias of shape \(20,\): Muon takes no such tensor"):
        optimizer_of(in_subspace(rest=rule("library.Library", name="Muon"))(), toy_model())


def test_moments_are_stored_as_asked_and_computed_in_float32() -> None:
    param, grads = torch.zeros(64, dtype=torch.bfloat16), gradients((64,), torch.bfloat16, 5)
    library = Library("NAdam")
    narrow = library.init(param, Slot("w", 0, 0.0, torch.bfloat16))
    exact = library.init(param, Slot("w", 0, 0.0, torch.float32))
    for grad in grads:
        rounded, computed = (library.update(grad, state, param, RATES).tensor() for state in (narrow, exact))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, computed, rtol=3e-2, atol=3e-2)  # bfloat16 keeps 8 bits
    dtypes = {key: value.dtype for key, value in narrow.items() if isinstance(value, Tensor) and value.ndim}
    assert dtypes.pop("rule.exp_avg") == dtypes.pop("rule.exp_avg_sq") == torch.bfloat16
    assert narrow["rule.step"].dtype == torch.float32  # type: ignore[union-attr]  # a bfloat16 counter stops at 256


def test_after_a_reset_it_starts_anew() -> None:
    library = Library("Adagrad", {"initial_accumulator_value": 0.5})
    param, slot = torch.zeros(4, 3), Slot("w", 0, 0.0, torch.float32)
    used, fresh = library.init(param, slot), library.init(param, slot)
    first, second = gradients((4, 3), updates=2)
    library.update(first, used, param, RATES)
    for key, value in library.init(param, slot).items():  # as InSubspace resets
        if isinstance(value, Tensor):
            used[key].copy_(value)  # type: ignore[union-attr]
        else:
            used[key] = value
    again, anew = (library.update(second, state, param, RATES).tensor() for state in (used, fresh))
    assert torch.equal(again, anew)


@pytest.mark.parametrize("case", [("SOAP", {}), ("SimplifiedAdEMAMix", {}), ("Ranger", {})], ids=ids)
def test_lists_numbers_and_counters_of_a_group_resume_exactly(case: tuple[str, dict[str, Any]]) -> None:
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    grads = gradients((6, 4))
    whole, param = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    expected = steps(whole, optimizer_on(Library(*case), whole), grads)
    first = optimizer_on(Library(*case), param)
    steps(param, first, grads[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_on(Library(*case), param)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(steps(param, second, grads[5:], first=5), expected)


@pytest.mark.parametrize("name", ["AdamP", "AdaBelief", "SOAP", "RACS", "Shampoo"])
def test_state_of_the_package_is_counted_on_meta(name: str) -> None:
    """Some read numbers off their tensors, which the meta device has none of."""
    pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    library, param = Library(name), nn.Parameter(torch.ones(8, 6))
    planned = library.init(torch.empty(8, 6, device="meta"), Slot("w", 0, 0.0, torch.float32))
    optimizer = optimizer_on(library, param)
    steps(param, optimizer, gradients((8, 6), updates=1))
    found = optimizer.state[param]
    assert {key: getattr(value, "shape", None) for key, value in planned.items()} == {
        key: getattr(value, "shape", None) for key, value in found.items()
    }


def test_its_options_are_written_beside_its_name() -> None:
    words = ["strategy=galore", "strategy/inner=library", "strategy.inner.name=RAdam", "strategy.inner.betas=[0.8,0.9]"]
    part = compose(words).strategy.inner
    assert part is not None and part["betas"] == [0.8, 0.9]
    with pytest.raises(UserError, match=r"strategy\.rest\.bettas"):
        compose(["strategy=galore", "strategy.rest.bettas=[0.8,0.9]"])
