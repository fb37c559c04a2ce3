"""Adam-mini beside recorded figures and the package's class, Adam-atan2 beside its formula and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_train
from lowrank_train.optim.adam_atan2 import AdamAtan2
from lowrank_train.optim.adam_mini import AdamMini
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import Backproject
from lowrank_train.optim.moments import Adam
from lowrank_train.optim.subspace.coordinates import Coordinates
from lowrank_train.optim.subspace.svd import Svd
from lowrank_train.optim.transform import Rates, Slot, State, Transform, tensor_of

RATES = Rates(1e-2, 1e-2)
SHAPES = [(10, 6), (6, 10), (8, 8), (7, 5)]  # tall, wide, square, odd


def slot(name: str = "w", dtype: torch.dtype = torch.float64) -> Slot:
    return Slot(name, 0, 0.0, dtype)


def gradients(shape: tuple[int, ...], updates: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(updates)]


RECORDED = {  # norm, sum, first and last entry of W after eight steps of the gradients below
    (10, 6): (5.375708773280878, -26.342231561366482, 0.7707426274829907, -0.5131848523757605),
    (6, 10): (5.095629400055053, -23.98661026066168, 0.7629206864081283, -0.7740228105446267),
    (8, 8): (5.4472366370993175, -27.954154315671524, 0.7601672374636439, -0.6466440612051579),
}


@pytest.mark.parametrize("shape", RECORDED, ids=str)
def test_rows_give_the_recorded_figures(shape: tuple[int, int]) -> None:
    """Of an independent float64 implementation; 1e-12 is the rounding of eight steps of sums over ten numbers."""
    i, j = torch.meshgrid(*(torch.arange(1, n + 1, dtype=torch.float64) for n in shape), indexing="ij")
    param = nn.Parameter((0.3 * i + 0.2 * j).cos())
    optimizer = lowrank_train.optimizer("adam_mini", [("mlp.weight", param)], lr=0.01, weight_decay=0.1)
    for t in range(8):
        param.grad = (0.37 * i * (j + 1) + 0.11 * t * i).sin() + 0.5 * (0.23 * (i + 1) * j - 0.07 * t * j).cos()
        optimizer.step()
    weight = param.detach()
    found = (weight.norm().item(), weight.sum().item(), weight[0, 0].item(), weight[-1, -1].item())
    assert found == pytest.approx(RECORDED[shape], rel=1e-12)


class Named(nn.Module):
    """What the package's class knows by name and takes as the paper's code does: heads, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.q_proj, self.k_proj = (nn.Linear(16, rows, bias=False) for rows in (16, 8))  # k: two groups of heads
        self.norm = nn.LayerNorm(11, bias=False)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))


def test_heads_and_norms_are_those_of_the_package() -> None:
    """Both in float32, which its class computes in; 2e-6 is some ten roundings of each of twenty updates."""
    package = pytest.importorskip("pytorch_optimizer", reason="the extra `optimizers` is not installed")
    ours, theirs = Named(), Named()
    rule = lowrank_train.optimizer("adam_mini", ours, lr=1e-2, weight_decay=0.1, dim=16, n_heads=4, project=["*"])
    reference = package.AdamMini(theirs, lr=1e-2, weight_decay=0.1, num_embeds=16, num_heads=4, foreach=False)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        rule.step()
        reference.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine - other).abs().max() < 2e-6, name
    sizes = {name: tensor_of(rule.state[param], "exp_avg_sq").numel() for name, param in ours.named_parameters()}
    assert sizes == {"q_proj.weight": 4, "k_proj.weight": 2, "norm.weight": 1}


def test_a_bias_is_adam_and_vectors_do_not_decay() -> None:
    mine, other, norm = (nn.Parameter(torch.ones(9, dtype=torch.float64)) for _ in range(3))
    pairs = [("layer.bias", mine), ("norm.weight", norm)]
    rule = lowrank_train.optimizer("adam_mini", pairs, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW([other], lr=1e-2, weight_decay=0.0)
    for grad in gradients((9,)):
        mine.grad, other.grad, norm.grad = grad.clone(), grad.clone(), torch.zeros_like(grad)
        rule.step()
        reference.step()
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)  # the same sums in another order
    assert torch.equal(norm.detach(), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_subspace_a_block_is_a_line_that_is_not_compressed(side: Any, shape: tuple[int, int]) -> None:
    """By the formula on the small gradient; with a basis of coordinates the lines are those of the matrix."""
    of = "rows" if side == "left" else "columns"
    rule = InSubspace(Coordinates(density=0.5, of=of, every=3), AdamMini(), Backproject(1.0), "rotate")  # type: ignore[arg-type]
    param = torch.zeros(shape, dtype=torch.float64)
    state = rule.init(param, slot("q_proj.weight"))
    lines, axis = (shape[1], 0) if side == "left" else (shape[0], 1)
    assert tensor_of(state, "exp_avg_sq").numel() == lines
    second = torch.zeros(lines, dtype=torch.float64)
    for step, grad in enumerate(gradients(shape), 1):
        low = rule.compress(grad.clone(), state)
        direction = rule.update(low, state, param, RATES).tensor()
        second = 0.999 * second + 0.001 * low.square().mean(axis)
        scale = 1 / ((second / (1 - 0.999**step)).sqrt() + 1e-8) / (1 - 0.9**step)
        moment = rule.subspace.up(tensor_of(state, "exp_avg"), state, param.shape).tensor()
        torch.testing.assert_close(direction, moment * scale.unsqueeze(axis), rtol=1e-12, atol=1e-12)


def test_a_reset_begins_anew_and_what_leaves_no_line_is_refused() -> None:
    rule = InSubspace(Svd(rank=2, every=1), AdamMini(), Backproject(), "reset")
    param = torch.zeros(6, 4, dtype=torch.float64)
    used, fresh = (rule.init(param, slot("k_proj.weight")) for _ in range(2))
    first, second = gradients((6, 4), updates=2)
    rule.update(rule.compress(first, used), used, param, RATES)
    again, anew = (rule.update(rule.compress(second, s), s, param, RATES).tensor() for s in (used, fresh))
    torch.testing.assert_close(again.abs(), anew.abs(), rtol=1e-10, atol=1e-10)  # the signs of the bases differ
    with pytest.raises(ValueError, match="AdamMini keeps a second moment for each line"):
        InSubspace(Svd(rank=2, side="full"), AdamMini(), Backproject())


def test_rows_that_are_no_whole_heads_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"head_dim is 64, but a\.q_proj\.weight has 10 rows"):
        AdamMini().init(torch.zeros(10, 4), slot("a.q_proj.weight"))


def angle_steps(rule: Transform, grads: list[Tensor]) -> list[Tensor]:
    param = torch.zeros_like(grads[0])
    state = rule.init(param, slot())
    return [rule.update(grad, state, param, RATES).tensor() for grad in grads]


@pytest.mark.parametrize("shape", [*SHAPES, (11,)], ids=str)
def test_atan2_is_its_formula(shape: tuple[int, ...]) -> None:
    rule, grads = AdamAtan2((0.8, 0.95), a=1.1, b=0.7), gradients(shape)
    first, second = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for step, (grad, found) in enumerate(zip(grads, angle_steps(rule, grads), strict=True), 1):
        first, second = 0.8 * first + 0.2 * grad, 0.95 * second + 0.05 * grad.square()
        corrected = first / (1 - 0.8**step), (second / (1 - 0.95**step)).sqrt()
        torch.testing.assert_close(found, 1.1 * torch.atan2(corrected[0], 0.7 * corrected[1]), rtol=1e-12, atol=1e-12)


def test_atan2_does_not_see_the_scale_and_is_bounded() -> None:
    grads = gradients((7, 5))
    plain, scaled = (angle_steps(AdamAtan2(), [g * by for g in grads]) for by in (1.0, 2.0**-40))
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one, other)  # a power of two scales without rounding
        assert one.abs().max() <= 1.27 * math.pi / 2
    still = angle_steps(AdamAtan2(), [torch.zeros(3, dtype=torch.float64)])
    assert still[0].tolist() == [0.0, 0.0, 0.0]  # nothing over nothing moves nothing


def test_where_the_quotient_is_small_atan2_is_adam() -> None:
    """atan(x) = x - x^3 / 3 + ...: with b = 1000 every quotient is below 0.004, and the rest below 1e-5 of it."""
    grads = gradients((6, 4))
    angles, quotients = angle_steps(AdamAtan2(a=1000.0, b=1000.0), grads), angle_steps(Adam(eps=1e-30), grads)
    for angle, quotient in zip(angles, quotients, strict=True):
        torch.testing.assert_close(angle, quotient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", [AdamMini(), AdamAtan2()], ids=repr)
def test_pieces_are_the_whole(rule: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 weights and moments, walked a few rows at a time, end up as in one piece, bit for bit."""
    results = []
    for size in (2**20, 24):
        monkeypatch.setattr("lowrank_train.kernels.pieces.PIECE_ELEMENTS", {"cpu": size, "cuda": size})
        param = torch.linspace(-1, 1, 70).reshape(10, 7).bfloat16()
        state: State = rule.init(param, slot(dtype=torch.bfloat16))
        for grad in gradients((10, 7)):
            rule.apply(grad.bfloat16(), state, param, RATES, 1e-3)
        results.append((param, tensor_of(state, "exp_avg")))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(results[0][0], torch.linspace(-1, 1, 70).reshape(10, 7).bfloat16())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: AdamMini(betas=(0.9, 1.0)), r"AdamMini's betas\[1\] is 1.0"),
        (lambda: AdamMini(eps=0.0), "AdamMini's eps is 0.0"),
        (lambda: AdamMini(head_dim=0), "AdamMini's head_dim is 0"),
        (lambda: AdamAtan2(betas=(1.0, 0.9)), r"AdamAtan2's betas\[0\] is 1.0"),
        (lambda: AdamAtan2(b=0.0), "AdamAtan2's b is 0.0"),
    ],
)
def test_what_is_refused(build: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()
