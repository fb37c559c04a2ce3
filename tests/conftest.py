"""Settings every test needs before torch is imported, and the fixtures that find data lying beside the project."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch: threads that spin while they wait make a step tens of times slower as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails, and at once
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

PROJECT_ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """One thread: tests run side by side, and sums come out in the same order on every machine."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what reads data from beside the project, and skip GPU tests where there is no GPU."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if {"real_data", "reference_data"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.real)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


def _folder_beside(variable: str, default: str) -> Path:
    """The folder an environment variable names, or `default` beside the project; skips when there is none."""
    folder = Path(os.environ.get(variable) or PROJECT_ROOT.parent / default)
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set {variable}")
    return folder


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real corpora, tokenizers and a small pre-trained LLaMA: $LOWRANK_TRAIN_REAL_DATA, else ../shared/data."""
    return _folder_beside("LOWRANK_TRAIN_REAL_DATA", "shared/data")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Recorded trajectories of published optimizers: $LOWRANK_TRAIN_REFERENCE, else ../shared/reference."""
    return _folder_beside("LOWRANK_TRAIN_REFERENCE", "shared/reference")
