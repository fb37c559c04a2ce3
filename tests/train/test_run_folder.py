"""Where a run goes on: in place, over, from elsewhere, or not at all; and what may change on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_train.checkpoint import checkpoint_folder, save_checkpoint_folder
from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainerConfig
from lowrank_train.train.run_folder import changed_keys, prepare_run_folder, run_folder_path


def configured(tmp_path: Path, **changes: object) -> RunConfig:
    base = RunConfig(
        output_dir=str(tmp_path / "runs"),
        run_name="r",
        data=DataConfig(train=["a"], validation=["b"], tokenizer="t"),
        strategy=StrategyConfig(rest={"_target_": "lowrank_train.optim.moments.Adam"}),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def started(config: RunConfig, *steps: int) -> Path:
    folder = prepare_run_folder(config, is_first_rank=True)
    for step in steps:
        put_checkpoint(folder.path, step)
    folder.close()
    return folder.path


def put_checkpoint(run: Path, step: int) -> None:
    path = checkpoint_folder(run / "checkpoints", step)
    save_checkpoint_folder(path, {"w": torch.ones(2)}, {"global_step": step}, {"step": step})


def test_a_new_run_gets_its_folder_and_its_name(tmp_path: Path) -> None:
    config = configured(tmp_path, run_name=None)
    folder = prepare_run_folder(config, is_first_rank=True)
    assert folder.path == tmp_path / "runs" / "llama_1m-full-shakespeare" == run_folder_path(config)
    assert folder.resume_from is None and folder.step == 0 and not folder.remarks
    assert (folder.path / "config.yaml").is_file()


def test_the_same_command_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = started(config, 10, 20)
    (run / "checkpoints" / "step_00000030.partial").mkdir()
    folder = prepare_run_folder(config, is_first_rank=True)
    assert folder.step == 20
    assert not list((run / "checkpoints").glob("*.partial"))


def test_cadence_may_change_but_numbers_may_not(tmp_path: Path) -> None:
    config = configured(tmp_path)
    started(config, 10)
    other = replace(config, trainer=TrainerConfig(save_every_steps=7, log_every_steps=1))
    assert prepare_run_folder(other, is_first_rank=True).step == 10
    other = replace(config, optim=OptimConfig(lr=0.5), seed=1)
    with pytest.raises(UserError) as refused:
        prepare_run_folder(other, is_first_rank=True)
    text = str(refused.value)
    assert "optim.lr is 0.5, but the run" in text and "has 0.001" in text and "seed is 1" in text
    assert "run_name=" in text and "resume=false" in text


def test_length_is_a_number_of_training_unless_the_rate_is_constant(tmp_path: Path) -> None:
    for schedule, refused in (("cosine", True), ("constant", False)):
        config = configured(tmp_path, run_name=schedule, optim=OptimConfig(schedule=schedule))  # type: ignore[arg-type]
        started(config, 10)
        longer = replace(config, trainer=TrainerConfig(steps=99_999))
        if refused:
            with pytest.raises(UserError, match=r"trainer\.steps"):
                prepare_run_folder(longer, is_first_rank=True)
        else:
            assert prepare_run_folder(longer, is_first_rank=True).step == 10


def test_starting_over_keeps_the_old_folder(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = started(config, 10)
    for number in (1, 2):
        folder = prepare_run_folder(replace(config, resume="false"), is_first_rank=True)
        assert folder.resume_from is None
        assert f"{run}.{number}" in folder.remarks[0]
        folder.close()
    assert (tmp_path / "runs" / "r.1" / "checkpoints" / "step_00000010").is_dir()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = started(config, 10)
    before = sorted(run.rglob("*"))
    assert prepare_run_folder(config, is_first_rank=False).step == 10
    assert prepare_run_folder(replace(config, resume="false"), is_first_rank=False).resume_from is None
    assert sorted(run.rglob("*")) == before


def test_a_damaged_checkpoint_is_passed_over_and_only_damaged_ones_are_not_overwritten(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = started(config, 10, 20)
    (run / "checkpoints" / "step_00000020" / "model.safetensors").write_bytes(b"")
    folder = prepare_run_folder(config, is_first_rank=True)
    assert folder.step == 10 and "step_00000020" in folder.remarks[0]
    (run / "checkpoints" / "step_00000010" / "training_state.pt").unlink()
    folder.close()
    with pytest.raises(UserError, match="resume=false"):
        prepare_run_folder(config, is_first_rank=True)


def test_going_on_from_elsewhere(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = started(config, 10, 20)
    (run / "metrics.csv").write_text("step\n1\n", encoding="utf-8")
    longer = replace(config, run_name="longer", resume=str(run), optim=OptimConfig(lr=0.5))
    folder = prepare_run_folder(longer, is_first_rank=True)
    assert folder.step == 20 and folder.path.name == "longer"
    assert "optim.lr was 0.001, is now 0.5" in folder.remarks
    assert (folder.path / "metrics.csv").read_text(encoding="utf-8") == "step\n1\n"
    at_ten = replace(longer, run_name="at_ten", resume=str(run / "checkpoints" / "step_00000010"))
    assert prepare_run_folder(at_ten, is_first_rank=True).step == 10
    wider = replace(at_ten, run_name="wider", model=replace(config.model, hidden_size=256))
    with pytest.raises(UserError, match=r"model\.hidden_size is 256.*made with 128"):
        prepare_run_folder(wider, is_first_rank=True)
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a complete checkpoint"):
            prepare_run_folder(replace(longer, run_name="n", resume=str(nothing)), is_first_rank=True)


def test_going_on_from_elsewhere_does_not_mix_two_runs(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run, other = started(config, 10), started(replace(config, run_name="other"), 5)
    assert other != run
    with pytest.raises(UserError, match="holds other checkpoints"):
        prepare_run_folder(replace(config, run_name="other", resume=str(run)), is_first_rank=True)


def test_going_back_in_the_same_folder_would_leave_later_checkpoints_behind(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = started(config, 10, 20)
    back = replace(config, resume=str(run / "checkpoints" / "step_00000010"))
    with pytest.raises(UserError, match="holds later checkpoints"):
        prepare_run_folder(back, is_first_rank=True)
    newest = replace(config, resume=str(run / "checkpoints" / "step_00000020"))
    assert prepare_run_folder(newest, is_first_rank=True).step == 20


def test_a_complete_run_is_recognised(tmp_path: Path) -> None:
    config = configured(tmp_path, trainer=TrainerConfig(steps=20))
    run = started(config, 20)
    (run / "result.json").write_text(json.dumps({"steps": 20, "val_loss": 1.0}), encoding="utf-8")
    assert prepare_run_folder(config, is_first_rank=True).finished == {"steps": 20, "val_loss": 1.0}
    (run / "result.json").write_text("{", encoding="utf-8")
    assert prepare_run_folder(config, is_first_rank=True).finished is None


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    config = configured(tmp_path)
    folder = prepare_run_folder(config, is_first_rank=True)
    lock = folder.path / ".lock"
    code = f"import fcntl; fcntl.flock(open({str(lock)!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
    with pytest.raises(UserError, match="another process"):
        prepare_run_folder(config, is_first_rank=True)
    folder.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_key_an_older_version_did_not_have_is_no_difference(tmp_path: Path) -> None:
    config = configured(tmp_path)
    assert changed_keys(config, {"seed": 42, "strategy": {"rest": {"_target_": "other"}}}) == {
        "strategy.rest._target_": ("other", "lowrank_train.optim.moments.Adam")
    }
