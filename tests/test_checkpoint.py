"""Checkpoint folders: what is read is what was written, damage is noticed, a full disk leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank_train.checkpoint import (
    STATE_FILE,
    WEIGHTS_FILE,
    DamagedCheckpoint,
    checkpoint_folder,
    checkpoint_folders,
    checkpoint_step,
    is_disk_full,
    load_state,
    load_weights,
    newest_complete,
    read_manifest,
    save_checkpoint_folder,
)


def save(parent: Path, step: int, size: int = 6) -> Path:
    shared = torch.arange(size, dtype=torch.float32).view(2, -1)
    weights = {"embed": shared, "head": shared, "norm": torch.ones(3, dtype=torch.bfloat16)}
    state = {"step": step, "moments": {"a": torch.full((size,), 0.5)}, "names": ["x", None]}
    folder = checkpoint_folder(parent, step)
    save_checkpoint_folder(folder, weights, state, {"step": step, "tokenizer": "abc"})
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False)
        if (os.geteuid() == 0)
        else None
    )
    if mounted is None or mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_weights_and_state_come_back_exactly_and_tied_ones_once(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = read_manifest(folder)
    weights = load_weights(folder, manifest)
    assert manifest["tokenizer"] == "abc"
    assert manifest["aliases"] == {"head": "embed"}
    assert weights["head"] is weights["embed"]
    assert torch.equal(weights["embed"], torch.arange(6.0).view(2, 3))
    assert weights["norm"].dtype == torch.bfloat16
    state = load_state(folder)
    assert torch.equal(state["moments"]["a"], torch.full((6,), 0.5))
    assert state["names"] == ["x", None]


def test_folders_are_listed_by_step_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    for step in (1200, 5, 30):
        save(tmp_path, step)
    (tmp_path / "step_00002000.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert [checkpoint_step(folder) for folder in checkpoint_folders(tmp_path)] == [5, 30, 1200]
    assert checkpoint_folders(tmp_path / "nowhere") == []


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no manifest", "bad manifest"])
def test_the_newest_complete_checkpoint_is_taken_and_a_damaged_one_named(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    victim = bad / (STATE_FILE if damage == "cut" else WEIGHTS_FILE)
    content = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        victim.unlink()
    elif damage == "no manifest":
        (bad / "manifest.json").unlink()
    else:
        (bad / "manifest.json").write_text("{", encoding="utf-8")
    found, passed_over = newest_complete(tmp_path)
    assert found == good
    assert len(passed_over) == 1 and str(bad) in passed_over[0]
    with pytest.raises(DamagedCheckpoint):
        read_manifest(bad)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, size=6)
    folder = save(tmp_path, 3, size=8)
    assert load_weights(folder, read_manifest(folder))["embed"].shape == (2, 4)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(small_disk, 1)
    with pytest.raises(OSError, match="free") as refused:  # told before anything is written
        save(small_disk, 2, size=2_000_000)
    assert is_disk_full(refused.value)
    for written in ("weights", "state"):  # and where the room goes away meanwhile
        monkeypatch.setattr("lowrank_train.checkpoint.require_room", lambda *_: None)
        tensors = {"w": torch.zeros(2_000_000 if written == "weights" else 2)}
        state = {"s": torch.zeros(2_000_000 if written == "state" else 2)}
        with pytest.raises(OSError, match="could not write") as full:
            save_checkpoint_folder(checkpoint_folder(small_disk, 2), tensors, state, {})
        assert is_disk_full(full.value)
        assert [path.name for path in small_disk.iterdir()] == [good.name]
    assert newest_complete(small_disk) == (good, [])
