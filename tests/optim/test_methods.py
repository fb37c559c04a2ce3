"""What every method must satisfy: moments of stepping, accumulation, clipping, resume, bad gradients, bytes."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch

from lowrank_train.optim.optimizer import TransformOptimizer
from tests.optim.methods import METHODS, Method, optimizer_of, run_update, toy_batch, toy_model, weights
from tests.train.conftest import differences

UPDATES = 10  # across two moves of the basis
projecting = [method for method in METHODS if method.projects]


@functools.cache
def run(
    method: Method, when: str = "after_backward", micro_batches: int = 1, clip: float | None = None, decay: float = 0.0
) -> torch.Tensor:
    """The weights after each update."""
    return run_with(method, when=when, micro_batches=micro_batches, grad_clip=clip, weight_decay=decay)


def run_with(method: Method, micro_batches: int, **arguments: Any) -> torch.Tensor:
    model = toy_model()
    optimizer = optimizer_of(method.config(), model, micro_batches=micro_batches, **arguments)
    after = []
    for update in range(UPDATES):
        run_update(model, optimizer, update, micro_batches)
        after.append(weights(model))
    return torch.stack(after)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_in_backward_equals_after_backward(method: Method) -> None:
    assert torch.equal(run(method, decay=0.1), run(method, "in_backward", decay=0.1))


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("method", projecting, ids=str)
def test_project_in_backward_equals_after_backward(method: Method, clip: float | None) -> None:
    plain, projected = (run(method, when, clip=clip) for when in ("after_backward", "project_in_backward"))
    assert torch.equal(plain, projected)
    assert not torch.equal(plain[-1], plain[-2])


@pytest.mark.parametrize("when", ["after_backward", "project_in_backward"])
@pytest.mark.parametrize("method", projecting, ids=str)
def test_accumulation_equals_one_batch(method: Method, when: str) -> None:
    """Four micro-batches are one batch of four times the size; float32 sums differ in order alone."""
    whole, parts = run(method)[-1], run(method, when, micro_batches=4)[-1]
    displacement = (whole - weights(toy_model())).norm()
    assert (whole - parts).norm() / displacement < 1e-4


@pytest.mark.parametrize("method", projecting, ids=str)
def test_projected_clipping_under_accumulation(method: Method) -> None:
    arguments: dict[str, Any] = {"micro_batches": 4, "grad_clip": 0.05, "clip_norm_of": "projected"}
    plain, projected = (
        run_with(method, when=when, **arguments)[-1] for when in ("after_backward", "project_in_backward")
    )
    displacement = (plain - weights(toy_model())).norm()
    assert (plain - projected).norm() / displacement < 1e-4


@pytest.mark.parametrize("method", projecting, ids=str)
def test_project_in_backward_frees_gradients(method: Method) -> None:
    """Outside the window that decides a basis, no matrix gradient is alive after any micro-batch."""
    model = toy_model()
    optimizer = optimizer_of(method.config(), model, when="project_in_backward", micro_batches=2)
    run_update(model, optimizer, 0, 2)
    matrices = [param for param in model.parameters() if param.ndim == 2]
    due = [param for param in matrices if optimizer.transform_of[param].refresh_due(optimizer.state[param])]
    assert len(due) < len(matrices)
    for part in toy_model_losses(model, 1):
        part.backward()
        assert [id(param) for param in matrices if param.grad is not None] == [id(param) for param in due]


def test_in_backward_frees_gradients() -> None:
    model = toy_model()
    optimizer = optimizer_of(METHODS[0].config(), model, when="in_backward")
    alive = -1

    def closure() -> None:
        nonlocal alive
        toy_model_losses(model, 0, 1)[0].backward()
        alive = sum(param.grad is not None for param in model.parameters())

    optimizer.step(closure)
    assert alive == 0


def toy_model_losses(model: torch.nn.Module, update: int, parts: int = 2) -> list[torch.Tensor]:
    inputs, targets = toy_batch(update)
    pairs = zip(inputs.chunk(parts), targets.chunk(parts), strict=True)
    return [torch.nn.functional.mse_loss(model(x), y) / parts for x, y in pairs]


@pytest.mark.parametrize("basis", ["window", "first_micro_batch"])
def test_basis_from_the_first_micro_batch_frees_every_gradient(basis: str) -> None:
    model, config = toy_model(), projecting[0].config()
    config.basis_under_accumulation = basis  # type: ignore[assignment]
    optimizer_of(config, model, when="project_in_backward", micro_batches=2)
    toy_model_losses(model, 0)[0].backward()
    held = sum(param.grad is not None for param in model.parameters() if param.ndim == 2)
    assert held == (3 if basis == "window" else 0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resume_is_exact(method: Method) -> None:
    """Weights and state equal those of the run that went on, bit for bit, across moves of the basis; saved safely."""
    model, saved = toy_model(), {}
    optimizer = optimizer_of(method.config(), model)
    for update in range(UPDATES):
        if update in (1, 3, 4, 5, 7):
            saved[update] = state_of(model, optimizer)
        run_update(model, optimizer, update)
    saved[UPDATES] = state_of(model, optimizer)
    for stop, end in ((1, UPDATES), (3, 5), (4, 5), (5, 7), (7, UPDATES)):
        found = loaded(saved[stop])
        resumed = toy_model()
        resumed.load_state_dict(found["model"])
        fresh = optimizer_of(method.config(), resumed)
        fresh.load_state_dict(found["optimizer"])
        for update in range(stop, end):
            run_update(resumed, fresh, update)
        assert differences(loaded(state_of(resumed, fresh)), loaded(saved[end])) == [], stop


def state_of(model: torch.nn.Module, optimizer: TransformOptimizer) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def loaded(state: bytes) -> Any:
    return torch.load(io.BytesIO(state), weights_only=True)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_loaded_state_keeps_its_dtype(method: Method) -> None:
    """torch casts state to the parameter's dtype when it loads; float32 moments of bfloat16 weights must stay."""
    model = toy_model(torch.bfloat16)
    config = method.config()
    optimizer = optimizer_of(config, model)
    for slot in optimizer.slots.values():
        object.__setattr__(slot, "dtype", torch.float32)
    optimizer.initialize()
    other = optimizer_of(method.config(), toy_model(torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    kept = {v.dtype for s in other.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
    assert kept - {torch.uint8, torch.int32, torch.int64} == {torch.float32}  # codes and indices have no other dtype


@pytest.mark.parametrize("when", ["after_backward", "project_in_backward", "in_backward"])
@pytest.mark.parametrize("method", projecting, ids=str)
def test_gradient_that_is_not_finite_is_skipped(method: Method, when: str) -> None:
    """One matrix is left alone for one update, its state too; it is counted and named; the run goes on."""
    model = toy_model()
    optimizer = optimizer_of(method.config(), model, when=when)
    spoilt = model[2].weight  # type: ignore[index]
    handle = spoilt.register_hook(lambda grad: grad * float("nan"))
    before = spoilt.detach().clone()
    run_update(model, optimizer, 0)
    assert optimizer.stats["skipped_names"] == ["2.weight"]
    assert torch.equal(spoilt, before)
    handle.remove()
    run_update(model, optimizer, 1)
    assert optimizer.stats["skipped_tensors"] == 0
    assert not torch.equal(spoilt, before)
    assert all(param.isfinite().all() for param in model.parameters())


def test_one_bad_micro_batch_spoils_the_window_of_its_matrix() -> None:
    model = toy_model()
    optimizer = optimizer_of(projecting[0].config(), model, when="project_in_backward", micro_batches=2)
    run_update(model, optimizer, 0, 2)
    spoilt, calls = model[2].weight, iter((1.0, float("inf")))  # type: ignore[index]
    spoilt.register_hook(lambda grad: grad * next(calls))
    before = spoilt.detach().clone()
    run_update(model, optimizer, 1, 2)
    assert optimizer.stats["skipped_names"] == ["2.weight"]
    assert torch.equal(spoilt, before)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_state_on_meta_is_what_a_run_allocates(method: Method) -> None:
    with torch.device("meta"):
        planned = optimizer_of(method.config(), toy_model())
    planned.initialize()
    model = toy_model()
    optimizer = optimizer_of(method.config(), model)
    run_update(model, optimizer, 0)
    assert planned.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_learns(method: Method) -> None:
    model = toy_model()
    optimizer = optimizer_of(method.config(), model, lr=3e-2)
    first = toy_model_losses(model, 0, 1)[0].item()
    for _ in range(100):
        run_update(model, optimizer, 0)
    assert toy_model_losses(model, 0, 1)[0].item() < 0.4 * first


def test_logged_norm_is_the_norm() -> None:
    for when in ("after_backward", "project_in_backward", "in_backward"):
        model, reference = toy_model(), toy_model()
        optimizer: TransformOptimizer = optimizer_of(projecting[0].config(), model, when=when)
        run_update(model, optimizer, 0)
        toy_model_losses(reference, 0, 1)[0].backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
        assert optimizer.stats["grad_norm"] == pytest.approx(expected.item(), rel=1e-6)
        assert 0 < optimizer.stats["grad_norm_projected"] < optimizer.stats["grad_norm"]


@pytest.mark.parametrize("method", projecting, ids=str)
def test_zero_gradients_are_counted_and_told_once(method: Method, caplog: pytest.LogCaptureFixture) -> None:
    """A layer cut off from the loss: its basis waits, the run goes on, the log names it one time."""
    model = toy_model()
    optimizer = optimizer_of(method.config(), model)
    handle = model[2].weight.register_hook(torch.zeros_like)  # type: ignore[index]
    for update in range(3):
        run_update(model, optimizer, update)
        assert optimizer.stats["kept_bases"] == 1
    assert [record.message for record in caplog.records if "2.weight is zero" in record.message] == caplog.messages
    assert len(caplog.messages) == 1
    handle.remove()
    run_update(model, optimizer, 3)
    assert optimizer.stats["kept_bases"] == 0
    assert optimizer.stats["refreshes"] >= 1
