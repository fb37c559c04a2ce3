"""Bytes on the wire: the formulas against rings played through chunk by chunk, and a small model's messages by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lowrank_train.cli import main
from lowrank_train.config import compose
from lowrank_train.config.schema import RunConfig
from lowrank_train.memory import zero_shares
from lowrank_train.memory.plan import counted, planned
from lowrank_train.memory.shares import Shares, units_of
from lowrank_train.memory.traffic import messages_of
from lowrank_train.memory.wire import FACTORS, Collective, Message, sent_bytes
from lowrank_train.models import meta_model
from lowrank_train.train.sharding import blocks_of
from tests.optim.bytes_by_rank import members_of, state_bytes_by_rank

ITEM = 8  # bytes of a float64
WIDTH, INNER, LAYERS, PIECES, RANK, EVERY = 64, 176, 2, 96, 16, 20
LAYER_MATRICES = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER  # four of attention, three of the MLP
NORMS = LAYERS * 2 * WIDTH + WIDTH
PARAMETERS = LAYERS * LAYER_MATRICES + NORMS + 2 * PIECES * WIDTH
LOW = LAYERS * (4 * WIDTH * RANK + 3 * RANK * INNER)  # the short side is compressed
BASES = LAYERS * 7 * WIDTH * RANK


class Ring:
    """Ranks that send chunks to the next, and count what they send."""

    def __init__(self, ranks: int, numbers: int) -> None:
        self.ranks = ranks
        self.chunks = [np.random.default_rng(rank).random((ranks, numbers // ranks)) for rank in range(ranks)]
        self.sent = [0] * ranks

    def pass_on(self, which: Callable[[int], int], take: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Every rank sends chunk which(rank) to the next, which makes of its own and that one what `take` says."""
        moving = [self.chunks[rank][which(rank)].copy() for rank in range(self.ranks)]
        for rank, chunk in enumerate(moving):
            self.sent[rank] += chunk.nbytes
            after, place = (rank + 1) % self.ranks, which(rank)
            self.chunks[after][place] = take(self.chunks[after][place], chunk)

    def reduce_scatter(self) -> None:
        for turn in range(self.ranks - 1):
            self.pass_on(lambda rank: (rank - turn) % self.ranks, np.add)  # noqa: B023 called at once

    def all_gather(self, held: int) -> None:
        """From rank r holding chunk r + held."""
        for turn in range(self.ranks - 1):
            self.pass_on(lambda rank: (rank + held - turn) % self.ranks, lambda own, new: new)  # noqa: B023


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_formulas_are_what_rings_send(ranks: int) -> None:
    numbers = 24 * ranks
    payload = numbers * ITEM

    def sends(collective: Collective, sent: list[int]) -> None:
        assert max(sent) == pytest.approx(FACTORS[collective](ranks) * payload, rel=1e-12), collective  # of whole bytes

    ring = Ring(ranks, numbers)
    total = np.sum(ring.chunks, axis=0)
    ring.reduce_scatter()
    for rank in range(ranks):
        np.testing.assert_allclose(ring.chunks[rank][(rank + 1) % ranks], total[(rank + 1) % ranks])
    sends("reduce_scatter", ring.sent)
    ring.all_gather(held=1)
    for rank in range(ranks):
        np.testing.assert_allclose(ring.chunks[rank], total)
    sends("all_reduce", ring.sent)

    ring = Ring(ranks, numbers)
    parts = np.stack([ring.chunks[rank][rank] for rank in range(ranks)])
    ring.all_gather(held=0)
    assert all(np.array_equal(chunks, parts) for chunks in ring.chunks)
    sends("all_gather", ring.sent)

    chain = Ring(ranks, numbers)  # each but the last hands on all that comes, chunk by chunk
    for rank in range(ranks - 1):
        chain.chunks[rank + 1][:] = chain.chunks[rank]
        chain.sent[rank] += chain.chunks[rank].nbytes
    assert np.array_equal(chain.chunks[-1], Ring(ranks, numbers).chunks[0])
    sends("broadcast", chain.sent)

    direct = Ring(ranks, numbers)  # chunk k goes to rank k
    sent = [sum(direct.chunks[rank][to].nbytes for to in range(ranks) if to != rank) for rank in range(ranks)]
    sends("all_to_all", sent)


def test_one_rank_sends_nothing() -> None:
    assert all(factor(1) == 0 for factor in FACTORS.values())
    assert Message("gradients", "all_reduce", 100.0, 3).sent_bytes(4) == 450
    assert sent_bytes([Message("a", "broadcast", 8.0, 0.5), Message("b", "all_gather", 8.0, 1)], 2) == 8


MODEL = (
    "recipe=null", f"model.hidden_size={WIDTH}", f"model.intermediate_size={INNER}", "data.seq_len=32",
    f"model.num_hidden_layers={LAYERS}", f"model.vocab_size={PIECES}", "trainer.batch_size=2",
)  # fmt: skip


def configured(*words: str) -> RunConfig:
    return compose([*MODEL, "task=plan", "trainer.accelerator=cpu", "trainer.devices=4", *words])


GALORE = ("strategy=galore", f"strategy.subspace.rank={RANK}", f"strategy.subspace.every={EVERY}")


def found(*words: str) -> dict[tuple[str, str, float], float]:
    """(what, collective, times) -> payload in numbers of float32."""
    config = configured(*words)
    messages = messages_of(config, *counted(config, PIECES))
    return {(one.what, one.collective, round(one.times, 9)): one.payload_bytes / 4 for one in messages}


def test_messages_of_ddp_by_hand() -> None:
    """Whatever the strategy, whole gradients once an update, also with accumulation; of galore the bases besides."""
    all_gradients = {("gradients", "all_reduce", 1): PARAMETERS}
    assert found("strategy=full", "trainer.strategy=ddp") == all_gradients
    assert found("strategy=full", "trainer.total_batch_size=24") == all_gradients  # auto is ddp
    bases = {("bases that have moved", "broadcast", 1 / EVERY): BASES}
    assert found(*GALORE, "trainer.strategy=ddp") == all_gradients | bases
    assert found("strategy=full", "trainer.devices=1") == {}


def test_messages_of_projected_ddp_by_hand() -> None:
    projected = LAYERS * LAYER_MATRICES
    assert found(*GALORE, "trainer.strategy=ddp", "trainer.reduce=projected") == {
        ("gradients", "all_reduce", 1): PARAMETERS - projected,
        ("gradients", "all_reduce", 1 / EVERY): projected,
        ("projected gradients", "all_reduce", 1 - 1 / EVERY): LOW,
        ("bases that have moved", "broadcast", 1 / EVERY): BASES,
    }


def padded(rows: int, columns: int, ranks: int) -> int:
    return math.ceil(rows / ranks) * ranks * columns


def test_messages_of_fsdp_by_hand() -> None:
    """Two micro-batches on 5 ranks, by which no number of rows but that of 5 x anything divides."""
    norm = padded(WIDTH, 1, 5)
    block = 4 * padded(WIDTH, WIDTH, 5) + 2 * padded(INNER, WIDTH, 5) + padded(WIDTH, INNER, 5) + 2 * norm
    around = 2 * padded(PIECES, WIDTH, 5) + norm
    words = ("trainer.strategy=fsdp", "trainer.devices=5", "trainer.total_batch_size=20")
    assert found("strategy=full", *words) == {
        ("weights, for the forward passes", "all_gather", 2): LAYERS * block + around,
        ("weights, for the backward passes", "all_gather", 2): LAYERS * block,
        ("gradients", "reduce_scatter", 2): LAYERS * block + around,
    }
    galore = found(*GALORE, *words)
    # Compressed on the right, rows are served where they lie: attention (square), gate and up (tall). Down is wide.
    here, owned = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER), LAYERS * WIDTH * INNER
    assert galore[("gradients, to whom a basis moves by", "all_to_all", 1 / EVERY)] == pytest.approx(here / 5)
    assert galore[("bases that have moved", "broadcast", 1 / EVERY)] == LAYERS * 6 * WIDTH * RANK
    assert galore[("gradients, to the owners of matrices", "all_to_all", 1)] == pytest.approx(owned / 5)
    assert galore[("weights, to the owners of matrices and back", "all_to_all", 1)] == pytest.approx(2 * owned / 5)


@pytest.mark.parametrize(("stage", "reduced"), [(1, 1), (2, 3)])
def test_messages_of_zero_by_hand(stage: int, reduced: int) -> None:
    """ZeRO's 2 times the parameters (arXiv 1910.02054, section 7), with three micro-batches."""
    got = found("strategy=full", f"trainer.strategy=deepspeed_zero{stage}", "trainer.total_batch_size=24",
                "trainer.accelerator=gpu")  # fmt: skip
    assert got == {
        ("gradients", "reduce_scatter", reduced): PARAMETERS,
        ("weights, after the update", "all_gather", 1): PARAMETERS,
    }


def test_messages_of_zero_3_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches of two passes each; norms, which are small here, are gathered once an update."""
    monkeypatch.setattr(zero_shares, "PERSISTENT_ELEMENTS", WIDTH)
    got = found("strategy=full", "trainer.strategy=deepspeed_zero3", "trainer.total_batch_size=24",
                "trainer.accelerator=gpu")  # fmt: skip
    assert got == {
        ("gradients", "reduce_scatter", 3): PARAMETERS,
        ("weights, for the forward passes", "all_gather", 3): PARAMETERS - NORMS,
        ("weights, for the backward passes", "all_gather", 3): PARAMETERS - NORMS,
        ("small weights, after the update", "all_gather", 1): NORMS,
    }


def test_a_device_of_zero_3_keeps_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of weights, gradients and state, no second copy; in a pass all that is large is whole, for the model
    is smaller than what is gathered ahead of time; and the bucket, which does not depend on the model."""
    monkeypatch.setattr(zero_shares, "PERSISTENT_ELEMENTS", WIDTH)
    on_gpus = "trainer.accelerator=gpu"
    one = planned(configured("strategy=full", "trainer.devices=1", on_gpus))
    three = planned(configured("strategy=full", "trainer.strategy=deepspeed_zero3", on_gpus))
    for kind in ("trained_weights", "state.exp_avg", "state.exp_avg_sq", "gradients"):
        assert three.bytes[kind] == PARAMETERS, kind  # 4 bytes each, on 4 devices: all numbers divide by 4
    assert three.persistent_bytes == 3 * PARAMETERS + one.bytes["buffers"]
    bucket = 4 * zero_shares.BUCKET_ELEMENTS
    more = three.phases["update: forward"] - one.phases["update: forward"]
    # Three quarters of weights, gradients and two moments are gone; the weights are there once more, whole.
    assert more == bucket + 4 * PARAMETERS - 4 * (4 * PARAMETERS * 3 // 4)
    kept = three.persistent_bytes + three.bytes["gradients"] + 2 * 2 * 32 * 8  # ids and labels of a micro-batch
    assert three.phases["checkpoint"] == kept + bucket + 4 * NORMS + 4 * INNER * WIDTH  # the largest matrix


def test_units_are_those_that_fsdp_cuts() -> None:
    config = configured("strategy=full", "trainer.strategy=fsdp")
    model = meta_model(config.model, vocab_size=PIECES, dtype=torch.float32)
    units = units_of(config, model)
    assert [unit.params for unit in units if unit.is_block] == [tuple(b.parameters()) for b in blocks_of(model)]
    assert sum(len(unit.params) for unit in units) == len(list(model.parameters()))


def test_a_device_of_fsdp_keeps_its_part() -> None:
    """Weights and elementwise state an even part of everything; of galore the bases whole, and down's on its owner."""
    one = planned(configured("strategy=full", "trainer.devices=1"))
    full = planned(configured("strategy=full", "trainer.strategy=fsdp"))
    for kind in ("trained_weights", "state.exp_avg", "state.exp_avg_sq", "gradients"):
        assert full.bytes[kind] == 4 * PARAMETERS / 4, kind  # bytes of float32 / devices: all rows divide by 4
    assert full.bytes["buffers"] == one.bytes["buffers"]
    galore = planned(configured(*GALORE, "trainer.strategy=fsdp")).bytes
    owned_low, owned_basis = RANK * INNER, WIDTH * RANK  # one each of the two layers, on two of the four ranks
    assert galore["state.basis"] == 4 * (LAYERS * 6 * WIDTH * RANK + owned_basis)
    rest = (PARAMETERS - LAYERS * LAYER_MATRICES) // 4
    assert galore["state.exp_avg"] == 4 * (rest + LAYERS * (4 * WIDTH + 2 * INNER) * RANK // 4 + owned_low)
    rows = 2 * 2 * 32 * 8  # ids and labels of a micro-batch
    assert full.phases["checkpoint"] == full.persistent_bytes + full.bytes["gradients"] + rows  # nothing is whole then
    block = LAYER_MATRICES + 2 * WIDTH
    around = 2 * PIECES * WIDTH + WIDTH
    less = one.phases["update: forward"] - full.phases["update: forward"]
    # Three quarters of weights, gradients and two moments are gone; two blocks and what is around them are whole.
    assert less == 4 * (4 * PARAMETERS * 3 // 4 - 2 * block - around)


@pytest.mark.parametrize(
    "words",
    [
        GALORE,
        ("strategy=fira", *GALORE[1:]),
        ("strategy=galore_8bit", *GALORE[1:]),
        ("strategy=adafactor",),
        (*GALORE, "precision=bf16_kahan"),
    ],
    ids=lambda words: "-".join(words[:1] + words[3:]),
)
@pytest.mark.parametrize("ranks", [3, 8])
def test_state_of_the_fullest_rank(words: tuple[str, ...], ranks: int) -> None:
    """Added up over kinds, what optim/owners.py counts for the rank that keeps most, also where rows do not go up."""
    config = configured(*words, "trainer.strategy=fsdp", f"trainer.devices={ranks}")
    model, optimizer = counted(config, PIECES)
    most = max(state_bytes_by_rank(members_of(optimizer), ranks, config.precision.rounding))
    kept = Shares.of(config).kept(config, model, optimizer)
    assert sum(count for kind, count in kept.items() if kind.startswith("state.")) == most


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MODEL, *GALORE]
    assert main(["plan", *words, "trainer=fsdp", "trainer.devices=8", "format=json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["together"] == "fsdp" and said["devices"] == 8
    assert said["sent_bytes_per_update"] == pytest.approx(sum(one["sent_bytes"] for one in said["messages"]))
    assert main(["plan", *words, "trainer=ddp", "trainer.devices=8", "trainer.reduce=projected"]) == 0
    said = capsys.readouterr().out
    assert "8 devices, ddp (reduce=projected)" in said
    assert "projected gradients, all-reduce" in said
