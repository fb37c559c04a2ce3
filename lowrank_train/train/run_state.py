"""What a run remembers beside weights and optimizer: counters, places in the data, random generators."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch


@dataclass
class Counters:
    """Sums over the whole run, interruptions included; saved with every checkpoint so that the curve goes on."""

    tokens: int = 0  # real tokens over all ranks
    positions: int = 0  # tokens and padding
    documents: int = 0  # begun; counted only with data.log_documents
    refreshes: int = 0  # subspaces recomputed, one a matrix
    refresh_sec: float = 0.0
    skipped_tensors: int = 0  # updates of a parameter left out because its gradient was not finite
    measured_tokens: int = 0  # tokens, positions and seconds of the updates that count for throughput
    measured_positions: int = 0
    measured_sec: float = 0.0
    elapsed_sec: float = 0.0  # wall clock in all sessions, up to the last update
    peak_memory_bytes: int = 0
    sessions: int = 0
    data_ended: bool = False
    evaluation: dict[str, Any] = field(default_factory=dict)  # the last one, as the head gives it
    best_evaluation: dict[str, Any] = field(default_factory=dict)  # with its score
    pending_row: dict[str, Any] = field(default_factory=dict)  # of an update whose evaluation was interrupted

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Counters:
        """Counters from a checkpoint; names this version does not know are left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in saved.items() if key in known})

    def as_saved(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def tokens_per_sec(self) -> float:
        return self.measured_tokens / self.measured_sec if self.measured_sec else 0.0

    @property
    def positions_per_sec(self) -> float:
        return self.measured_positions / self.measured_sec if self.measured_sec else 0.0


class Stopwatch:
    """Seconds of training, without what is spent on evaluating and saving."""

    def __init__(self) -> None:
        self.begin_session()

    def begin_session(self) -> None:
        """The first lap starts now."""
        self._session_began = self._lap_began = time.perf_counter()
        self.laps = 0
        self._laps_sec = 0.0

    def end_lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        seconds = now - self._lap_began
        self._lap_began = now
        self.laps += 1
        if self.laps > 1:
            self._laps_sec += seconds
        return seconds

    def leave_out_until_now(self) -> None:
        """What happened since the last lap was not training."""
        self._lap_began = time.perf_counter()

    def session_sec(self) -> float:
        """Seconds since the session began, everything included."""
        return time.perf_counter() - self._session_began

    def mean_lap_sec(self) -> float | None:
        """Seconds of a lap, without the first, which warms up; None before there is another."""
        return self._laps_sec / (self.laps - 1) if self.laps > 1 else None


def random_state() -> dict[str, Any]:
    """The state of every global generator of this process, as tensors and numbers."""
    # The global generator of numpy is old style, and is what libraries draw from.
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` was called; states of absent GPUs are left out."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])


def seed_everything(seed: int, *, threads: int | None = None) -> None:
    """Seed the global generators (what matters has its own seed by name; this is for what libraries draw) and fix the
    number of CPU threads, on which the order of sums depends; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
