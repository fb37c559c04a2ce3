"""A rehearsal goes through every phase, names the one that fails, and leaves no trace in the run that follows."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_train.config import compose
from lowrank_train.config.errors import RunStopped
from lowrank_train.data import load_tokenizer
from lowrank_train.evaluate import heads
from lowrank_train.train import checkpoint_io, rehearsal, room, run_length
from lowrank_train.train import run as run_file
from lowrank_train.train.fingerprints import differing, fingerprints, listed
from tests.train.conftest import assert_same_run, rows_of
from tests.train.processes import train_on_two

Run = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

RELORA = ["strategy=relora", "strategy.weights.rank=4", "strategy.merge.every=8"]
SST = ["strategy=sst", "strategy.weights.iteration_steps=8"]
HEAD = "rehearsal of every phase"
PHASES = ["first update", "second update", "evaluation", "save", "kill and resume", "sample", "export"]


def phases_of(text: str) -> dict[str, str]:
    """Name -> rest of the line, of the lines of phases."""
    lines = text[text.index(HEAD) :].split("rehearsed in")[0].splitlines()[1:]
    return {line[2:24].strip(): line[24:] for line in lines if line.strip()}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (["trainer.total_batch_size=8"], {"update, bases move": "7 moved"}),
        ([*RELORA, "strategy.merge.moments=magnitude"], {"third update": "", "events, an update": "merge"}),
        (["strategy=sltrain", "strategy.weights.rank=4"], {"third update": ""}),
        ([*SST, "strategy.weights.rank=4"], {"third update": "", "events, an update": "new sample"}),
        (
            ["data.num_workers=1", "strategy.when=project_in_backward", "optim.grad_clip=null"],
            {"update, bases move": ""},
        ),
    ],
    ids=["galore, two micro-batches", "relora with dropout", "sltrain", "sst", "a worker, projected in backward"],
)
def test_the_run_is_the_one_without(run: Run, capsys: Capture, settings: list[str], more: dict[str, str]) -> None:
    plain = run("plain", *settings, "rehearse=false")
    assert HEAD not in capsys.readouterr().out
    rehearsed = run("rehearsed", *settings, "rehearse=true")
    found = phases_of(capsys.readouterr().out)
    assert sorted(found) == sorted([*PHASES, *more])
    for name, text in {**more, "kill and resume": "the same bits, also an update later", "export": "logits"}.items():
        assert text in found[name]
    assert_same_run(plain, rehearsed)
    assert sorted(path.name for path in rehearsed.iterdir()) == sorted(path.name for path in plain.iterdir())
    assert not (rehearsed / "checkpoints" / rehearsal.FOLDER).exists()


def test_two_processes_rehearse_together(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """DDP over gloo: the same bits as without, which two runs of as many processes have."""
    for name, rehearse in (("plain", "false"), ("rehearsed", "true")):
        said = train_on_two(tiny(name, "trainer.steps=6", "trainer.threads=1", f"rehearse={rehearse}"), tmp_path)
    assert "the same bits, also an update later" in phases_of(said)["kill and resume"]
    assert_same_run(tmp_path / "plain", tmp_path / "rehearsed")


def test_auto_rehearses_what_lasts_beyond_an_hour(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("plain")
    assert HEAD not in capsys.readouterr().out
    monkeypatch.setattr(run_length, "LONG_RUN_SEC", 0.0)
    long = run("long", "data.log_documents=true")
    out = capsys.readouterr().out
    assert set(PHASES) < set(phases_of(out))
    assert out.index("rehearsed in") < out.index("step:  1/12") and out.count("step:  1/12") == 1
    assert rows_of(plain) == rows_of(long)

    def only_the_first_was_slow(*arguments: Any) -> None:
        monkeypatch.setattr(run_length, "LONG_RUN_SEC", 1e9)
        rehearsal.rehearse(*arguments)

    monkeypatch.setattr(run_length, "LONG_RUN_SEC", 0.0)
    monkeypatch.setattr(run_file, "rehearse", only_the_first_was_slow)
    short = run("short")
    out = capsys.readouterr().out
    assert "the rest is left out" in out and "evaluation" not in out
    assert_same_run(plain, short)


def test_a_run_that_goes_on_does_not_rehearse_again(run: Run, capsys: Capture) -> None:
    run("r", "optim.schedule=constant", "trainer.steps=6")
    capsys.readouterr()
    run("r", "optim.schedule=constant", "trainer.steps=8", "rehearse=true")
    assert HEAD not in capsys.readouterr().out


def test_what_is_too_short_says_so(run: Run, capsys: Capture, corpus: Path) -> None:
    run("updates", "trainer.steps=4", "rehearse=true")
    assert "left out: a run of 4 updates is its own" in capsys.readouterr().out
    few = ["data.repeat=false", f"data.train=[{corpus}/validation.jsonl]", "data.packing=pad", "trainer.batch_size=2"]
    run("data", *few, "rehearse=true")
    assert "the data end after 2 updates: the rest is left out" in capsys.readouterr().out


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def one_bit_off(load: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def altered(folder: Path) -> Any:
        state = load(folder)
        tensor = next(value for value in state["optimizer_states"][0]["state"][0].values() if torch.is_tensor(value))
        tensor.view(torch.uint8).reshape(-1)[0] ^= 1
        return state

    return altered


def at_the_beginning_of_the_data(load: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def altered(folder: Path) -> Any:
        state = load(folder)
        [position] = state["lowrank_train"]["positions"]
        position["lanes"]["0"] = {"place": dict.fromkeys(position["lanes"]["0"]["place"], 0), "token": 0}
        return state

    return altered


FULL = OSError(errno.ENOSPC, "No space left on device")
NO_MEMORY = torch.OutOfMemoryError("tried to allocate 20.00 GiB")
FAILURES: list[tuple[Any, str, Any, int, list[str]]] = [
    (heads, "causal_loss", raising(NO_MEMORY), 3, ["rehearsal, first update: out of memory", "20.00 GiB"]),
    (heads, "causal_loss", raising(ValueError("odd\nshapes")), 1, ["first update: ValueError: odd\n", "log.txt"]),
    (rehearsal, "make_bases_due", raising(RuntimeError("LAPACK")), 1, ["rehearsal, second update: RuntimeError"]),
    (heads, "evaluate", raising(RuntimeError("no kernel")), 1, ["rehearsal, evaluation: RuntimeError: no kernel"]),
    (checkpoint_io, "save_checkpoint_folder", raising(FULL), 5, ["rehearsal, save: the disk is full: [Errno 28]"]),
    (room.shutil, "disk_usage", lambda _: SimpleNamespace(free=0), 5, ["rehearsal, save", "output_dir"]),
    (checkpoint_io, "load_state", one_bit_off, 1, ["kill and resume: loaded otherwise than saved: state 0 "]),
    (checkpoint_io, "load_state", at_the_beginning_of_the_data, 1, ["kill and resume: the next update differs: loss"]),
    (rehearsal, "sampled_paragraph", raising(NO_MEMORY), 3, ["rehearsal, sample: out of memory"]),
    (rehearsal, "compare", raising(RunStopped("export failed: logits", 1)), 1, ["rehearsal, export: export failed"]),
]


@pytest.mark.parametrize(
    ("owner", "name", "instead", "code", "words"), FAILURES, ids=[f"{row[4][0][:40]}, {row[1]}" for row in FAILURES]
)
def test_a_phase_that_fails_ends_it_now(
    run: Run,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    instead: Any,
    code: int,
    words: list[str],
) -> None:
    if instead in (one_bit_off, at_the_beginning_of_the_data):
        instead = instead(getattr(owner, name))
    if owner is room.shutil:  # of the room alone: a checkpoint asks the disk too
        owner = room
        name, instead = "shutil", SimpleNamespace(disk_usage=instead)
    monkeypatch.setattr(owner, name, instead)
    folder = run("r", "rehearse=true", code=code)
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert ("rehearse=false" in err) == (code == 1)
    assert ("Traceback" in (folder / "log.txt").read_text(encoding="utf-8")) == ("log.txt" in err)
    assert list((folder / "checkpoints").iterdir()) == [] and not (folder / "metrics.csv").exists()


def test_a_signal_ends_a_rehearsal(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(optimizer: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr(rehearsal, "make_bases_due", signalled)
    folder = run("r", "rehearse=true", code=143)
    text = capsys.readouterr()
    assert "stopped by SIGTERM; nothing was trained" in text.err and "kill and resume" not in text.out
    assert list((folder / "checkpoints").iterdir()) == []


def test_a_signal_in_the_first_update_is_not_lost(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    real = heads.causal_loss

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(heads, "causal_loss", real)
        return real(*arguments, **options)

    plain = run("plain")
    monkeypatch.setattr(run_length, "LONG_RUN_SEC", 0.0)
    monkeypatch.setattr(heads, "causal_loss", signalled)
    run("r", code=143)
    assert "stopped by SIGTERM after step 1; everything is saved" in capsys.readouterr().err
    assert_same_run(plain, run("r"))
    assert HEAD not in capsys.readouterr().out


def test_what_the_user_gave_is_his_to_mend(run: Run, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    run("r", "rehearse=true", f"data.validation=[{tmp_path}/empty.jsonl]", code=2)
    assert "rehearsal, first update: data.validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("free_copies", "keep", "fault", "fact"),
    [(3.0, 3, "", "free for 4"), (2.9, 3, "use trainer.keep_checkpoints=2 or an", ""), (0.5, 1, "use an output", "")],
)
def test_the_disk_must_hold_what_is_kept_and_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_copies: float, keep: int, fault: str, fact: str
) -> None:
    """The rehearsal's own checkpoint goes, so that its bytes count as free."""
    for name, size in (("model.safetensors", 600), ("training_state.pt", 400)):
        (tmp_path / name).write_bytes(b"0" * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(1000 * free_copies)))
    found = room.room_for_checkpoints(tmp_path, keep)
    assert fault in found[0] and bool(fault) == bool(found[0])
    assert fact in found[1] and bool(fact) == bool(found[1])


def test_an_export_needs_a_copy_on_disk_and_three_in_memory(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """141,408 weights: two of 2048 x 32 at the ends, 4 of 32 x 32 and 3 of 32 x 64 between them, three norms of 32."""
    count = 2 * 2048 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    for words, bytes_a_weight in (["precision=bf16"], 2), (["precision=bf16", *RELORA], 4):
        config = compose(tiny("r", *words))
        tokenizer = load_tokenizer(config.data.tokenizer)
        disk, memory = int(1.05 * 2 * count), int(1.05 * 3 * bytes_a_weight * count)
        for free_disk, free_memory, lacking in (
            (disk, memory, ""),
            (disk - 1, memory, "of disk"),
            (disk, memory - 1, "of main memory"),
        ):
            monkeypatch.setattr(room.shutil, "disk_usage", lambda _, free=free_disk: SimpleNamespace(free=free))
            monkeypatch.setattr(room, "main_memory_bytes", lambda free=free_memory: (10**12, free))
            found = room.lacking_for_export(config, tokenizer, tmp_path)
            assert lacking in found and bool(lacking) == bool(found)


def test_a_bit_a_type_or_a_number_makes_a_difference() -> None:
    def held(weight: torch.Tensor, moment: Any, step: int) -> Any:
        model = SimpleNamespace(state_dict=lambda keep_vars: {"w": weight})
        optimizer = SimpleNamespace(state_dict=lambda: {"state": {0: {"exp_avg": [moment], "step": step}}})
        return fingerprints(SimpleNamespace(model=model, optimizer=optimizer))  # type: ignore[arg-type]

    weight, moment = torch.arange(6.0).reshape(2, 3), torch.tensor(1.0, dtype=torch.bfloat16)
    first = held(weight, moment, 3)
    assert differing(first, held(weight.clone(), moment.clone(), 3)) == []
    assert differing(first, held(weight.t().contiguous().t(), moment, 3)) == []  # how it lies in memory is no matter
    assert differing(first, held(weight.nextafter(weight + 1), moment, 3)) == ["weights w"]
    assert differing(first, held(weight.reshape(3, 2), moment, 3)) == ["weights w"]
    assert differing(first, held(weight, moment.float(), 4)) == ["state 0 exp_avg 0", "state 0 step"]
    torch.rand(1)
    assert differing(first, held(weight, moment, 3)) == ["generator"]
    assert listed(list("abcde")) == "a, b, c and 2 more" and listed(["a"]) == "a"
