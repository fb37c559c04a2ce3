"""FSDP2 on two processes of this machine: the numbers, checkpoints and endings of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_train.checkpoint import DamagedCheckpoint, checkpoint_folders, read_manifest
from lowrank_train.checkpoint_shards import SHARDS_FOLDER, take_apart
from lowrank_train.cli import main
from lowrank_train.config import UserError, compose
from lowrank_train.config.errors import EXIT_DISK_FULL, EXIT_TERMINATED
from lowrank_train.config.files import to_container
from lowrank_train.parallel import refuse_parallel
from lowrank_train.train.level import LevelBatches
from lowrank_train.train.run_folder import changed_keys
from tests.train.conftest import assert_same_run, rows_of, saved, without_card
from tests.train.sharded_runs import FULL_DISK, STOPPED, train_all
from tests.two_processes import on_two

Words = Callable[..., list[str]]

SUBSPACE = ("strategy.subspace.rank=8", "strategy.subspace.every=2")
RANK = "strategy.weights.rank=4"
SLEEPING = ("strategy=lisa", "strategy.blocks.count=1", "strategy.blocks.every=2", "model.num_hidden_layers=2")
"""One layer after the other sleeps for two updates. A layer that wakes begins with lr g / (|g| + eps), which makes a
step of the last digits of a gradient near zero: eps=1e-4 lets numbers of two runs be compared."""
STRATEGIES: dict[str, tuple[str, ...]] = {
    "full": ("strategy=full", "model.tie_word_embeddings=true", "model.activation_checkpointing=true"),
    "galore": ("strategy=galore", *SUBSPACE, "strategy.when=project_in_backward", "optim.clip_norm_of=projected"),
    "galore_8bit": ("strategy=galore_8bit", *SUBSPACE),
    "muon": ("strategy=muon",),
    "sltrain": ("strategy=sltrain", RANK),
    "relora": ("strategy=relora", RANK, "strategy.weights.dropout=0", "strategy.merge.every=2"),
    "sst": ("strategy=sst", RANK, "strategy.weights.iteration_steps=2"),
    "lisa": (*SLEEPING, "strategy.inner.eps=1e-4"),
    "adalora": ("strategy=adalora", "strategy.weights.init_r=4", "strategy.weights.target_r=2"),
    "vb_lora": ("strategy=vb_lora", "strategy.weights.vector_length=4", "model.num_hidden_layers=2"),
    "peft": ("strategy=peft", "strategy.weights.type=LORA", "strategy.weights.r=4"),
}
MIXED = (*SLEEPING, "precision=bf16_mixed")
ROUNDED = {"muon": 1e-2, "galore_8bit": 1e-2}
"""Largest difference of weights and state, as a share of the largest number of a tensor, where rounding is coarse: an
orthogonalised update in bfloat16, an 8-bit code that falls on the other side. All others: 1e-4 of the state, since
bases of a decomposition turn by more than a gradient's last digits."""
ONE, TWO = ("trainer.batch_size=4",), ("trainer.batch_size=2", "trainer.devices=2", "trainer.strategy=fsdp")
RESUMED = {name: STRATEGIES[name] for name in ("galore", "relora", "lisa")}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, in one process and in one pair of processes; the folder of them all."""
    folder = tmp_path_factory.mktemp("sharded")

    def words(name: str, *more: str, steps: int = 4) -> list[str]:
        return [
            f"output_dir={folder}", f"run_name={name}", "seed=3", "data.packing=pad", "data.seq_len=32",
            "model.hidden_size=36", "model.intermediate_size=52", "model.num_hidden_layers=1",
            "model.num_attention_heads=3", f"data.train=[{corpus}/train.jsonl]",
            f"data.validation=[{corpus}/validation.jsonl]", "optim.schedule=constant", "optim.lr=0.006",
            "optim.warmup_steps=1", "optim.grad_clip=1.0", f"trainer.steps={steps}", "trainer.total_batch_size=8",
            "trainer.eval_every_steps=2", "trainer.save_every_steps=2", "trainer.accelerator=cpu", "trainer.threads=1",
            "generate.max_new_tokens=4", "rehearse=false", *more,
        ]  # fmt: skip

    with without_card():
        for name, strategy in (*STRATEGIES.items(), ("mixed", MIXED)):
            assert main(words(f"{name}-1", *strategy, *ONE)) == 0
        for name, strategy in RESUMED.items():
            assert main(words(f"{name}-121", *strategy, *ONE, steps=2)) == 0
            shutil.copytree(folder / f"{name}-1", folder / f"{name}-six-1")
            assert main(words(f"{name}-six-1", *strategy, *ONE, steps=6)) == 0
    lines: list[tuple[list[str], str | None, int]] = [
        (words(f"{name}-2", *strategy, *TWO), None, 0) for name, strategy in (*STRATEGIES.items(), ("mixed", MIXED))
    ]
    lines += [(words(f"{name}-121", *strategy, *TWO), None, 0) for name, strategy in RESUMED.items()]
    lines += [(words("galore-again", *STRATEGIES["galore"], *TWO), STOPPED, EXIT_TERMINATED)]
    lines += [(words("galore-again", *STRATEGIES["galore"], *TWO), None, 0)]
    lines += [(words("full_disk", "strategy=full", *TWO, steps=2), FULL_DISK, EXIT_DISK_FULL)]
    on_two(train_all, lines, folder=folder)
    with without_card():
        for name, strategy in RESUMED.items():
            assert main(words(f"{name}-121", *strategy, *ONE, steps=6)) == 0
    return folder


def assert_close(one: Path, two: Path, tolerance: float) -> None:
    """The same training: float32 sums are cut elsewhere on two ranks."""
    first, second = saved(one), saved(two)
    assert first["step"] == second["step"]
    for name, tensor in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], tensor, rtol=0, atol=max(1e-5, tolerance / 10))
    states, others = (found["state"]["optimizer_states"][0]["state"] for found in (first, second))
    assert states.keys() == others.keys()
    for number, state in states.items():
        for key, value in state.items():
            other = others[number][key]
            if not isinstance(value, torch.Tensor):
                assert other == value, f"{number} {key}"
            elif value.is_floating_point():
                largest = float(value.abs().max())
                torch.testing.assert_close(
                    other, value, rtol=0, atol=tolerance * largest + 1e-12, msg=f"{number} {key}"
                )
            else:
                assert other.shape == value.shape
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert (a["tokens"], a["events"], a["optim/refreshes"]) == (b["tokens"], b["events"], b["optim/refreshes"])
        for column in ("train/loss", "train/grad_norm", "val/loss"):
            assert bool(a[column]) == bool(b[column])
            if a[column]:
                assert float(b[column]) == pytest.approx(float(a[column]), rel=max(1e-5, tolerance / 2))


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_with_half_of_the_rows_are_one(runs: Path, name: str) -> None:
    """Weights and state, read whole from the shards; losses, norms, events; the evaluation on uneven batches."""
    assert_close(runs / f"{name}-1", runs / f"{name}-2", ROUNDED.get(name, 1e-4))
    one, two = (json.loads((runs / f"{name}-{count}" / "result.json").read_text()) for count in (1, 2))
    for key in ("val_tokens", "tokens", "parameters", "trainable_parameters"):
        assert one[key] == two[key]
    assert two["weights_bytes"] < 0.6 * one["weights_bytes"]  # on the device that has most


def test_blocks_gathered_in_bfloat16_compute_as_autocast_does(runs: Path) -> None:
    """Norms' weights aside, which are rounded too; a gradient near zero may change its sign, and Adam's step with it,
    so that it is the mean difference that is small, and not each: 4 steps of 0.006 move a weight by up to 0.024."""
    first, second = saved(runs / "mixed-1")["weights"], saved(runs / "mixed-2")["weights"]
    for name, tensor in first.items():
        assert float((second[name] - tensor).abs().mean()) < 2e-4
    for a, b in zip(rows_of(runs / "mixed-1"), rows_of(runs / "mixed-2"), strict=True):
        assert float(b["train/loss"]) == pytest.approx(float(a["train/loss"]), rel=1e-3)
        assert float(b["train/grad_norm"]) == pytest.approx(float(a["train/grad_norm"]), rel=1e-2)


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_then_two_then_one_are_one(runs: Path, name: str) -> None:
    """After updates 2 and 4 the run went on with another number of devices."""
    assert_close(runs / f"{name}-six-1", runs / f"{name}-121", 1e-4)


def test_a_signal_to_one_rank_and_the_same_command_again_change_no_bit(runs: Path) -> None:
    assert_same_run(runs / "galore-2", runs / "galore-again")


def test_disk_full_on_one_rank_ends_all_and_leaves_nothing(runs: Path) -> None:
    assert list((runs / "full_disk" / "checkpoints").iterdir()) == []


def test_export_of_shards_is_what_was_trained(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=export", f"run={runs / 'relora-2'}", f"out={tmp_path / 'out'}"]) == 0
    assert "differ by at most" in capsys.readouterr().out


def test_damaged_shard_is_noticed(runs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint_folders(runs / "peft-2" / "checkpoints")[-1], tmp_path / "step_00000004")
    victim = sorted((folder / SHARDS_FOLDER).iterdir())[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="shard-00002"):
        read_manifest(folder)


def test_no_file_of_a_sharded_checkpoint_is_a_pickle(runs: Path) -> None:
    folder = checkpoint_folders(runs / "full-2" / "checkpoints")[-1]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".pt", ".safetensors"}


def test_numbers_stay_and_tensors_are_noted() -> None:
    tensors: dict[str, torch.Tensor] = {}
    found = take_apart([{"state": {3: {"m": torch.ones(2, 5), "step": 7}}}], "optimizer_states", tensors)
    assert found[0]["state"][3]["step"] == 7
    assert list(tensors) == ["optimizer_states/0/state/3/m"]


def test_devices_may_change_while_an_update_sees_as_many_rows() -> None:
    before = to_container(compose(["trainer.batch_size=4"]))
    two = ["trainer.devices=2", "trainer.strategy=fsdp"]
    assert changed_keys(compose(["trainer.batch_size=2", *two]), before) == {}
    assert changed_keys(compose(["trainer.batch_size=4", *two]), before) == {"trainer.total_batch_size": (4, 8)}


@pytest.mark.parametrize(("mine", "most"), [(0, 3), (2, 3), (3, 3)])
def test_level_batches(mine: int, most: int) -> None:
    """A rank with fewer batches goes on with empty ones, in which nothing is to be predicted."""
    batches = [{"labels": torch.ones(1, 4)}] * mine
    level = LevelBatches(batches, lambda own: [own, most])
    for _ in range(2):
        found: list[dict[str, Any]] = list(level)
        assert found[:mine] == batches
        assert len(found) == most
        assert all(bool((batch["labels"] == -100).all()) for batch in found[mine:])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("strategy=q_galore precision=int8", "keeps codes with scales"),
        ("strategy=full model.compile=true", "model.compile=false"),
    ],
)
def test_what_rows_cannot_give_is_refused(words: str, reason: str) -> None:
    sharded = [*words.split(), "trainer.strategy=fsdp", "optim.grad_clip=null"]
    with pytest.raises(UserError, match=reason):
        compose([*sharded, "trainer.devices=2"])
    compose(sharded)  # one device has nobody to share with


def test_what_changes_in_the_middle_of_a_run_is_refused() -> None:
    with pytest.raises(UserError, match="in the middle of a run"):
        refuse_parallel(compose(["strategy=maestro", "trainer.strategy=fsdp", "trainer.devices=2"]))
