"""Counters, the stopwatch, and random generators that go on as if nothing had happened."""

from __future__ import annotations

import io
import random
import time

import numpy as np
import pytest
import torch

from lowrank_train.train.run_state import (
    Counters,
    Stopwatch,
    random_state,
    restore_random_state,
    seed_everything,
)


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002  (the global generator is what is saved)
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_generators_go_on_exactly_through_a_file_without_code() -> None:
    seed_everything(7)
    draws()
    buffer = io.BytesIO()
    torch.save(random_state(), buffer)
    expected = [draws(), draws()]
    buffer.seek(0)
    restore_random_state(torch.load(buffer, weights_only=True))
    assert [draws(), draws()] == expected
    seed_everything(7)
    assert draws() != expected[0]


def test_counters_survive_saving_and_unknown_names_do_no_harm() -> None:
    counters = Counters(tokens=5, pending_row={"step": 3}, measured_tokens=10, measured_sec=2.0)
    assert Counters.from_saved({**counters.as_saved(), "from_the_future": 1}) == counters
    assert counters.tokens_per_sec == 5.0
    assert Counters().tokens_per_sec == 0.0


def test_the_stopwatch_leaves_out_what_it_is_told_to() -> None:
    watch = Stopwatch()
    assert watch.mean_lap_sec() is None
    watch.end_lap()
    time.sleep(0.05)
    watch.leave_out_until_now()
    time.sleep(0.01)
    assert 0.01 <= watch.end_lap() < 0.05
    mean = watch.mean_lap_sec()
    assert mean == pytest.approx(0.01, abs=0.02)
    assert watch.session_sec() >= 0.06
