"""The command line: verbs, help, exit codes, sweeps; what a shell sees."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_train import cli
from lowrank_train.config import RunConfig, RunStopped, UserError, compose, save, sweeps
from lowrank_train.config.paths import group_choices

ROOT = Path(__file__).resolve().parents[1]
Calls = list[tuple[str, RunConfig]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The tasks that a command line starts, instead of doing them."""
    seen: Calls = []

    def dispatch(config: RunConfig) -> int:
        seen.append((config.task, config))
        return 0

    monkeypatch.setattr(cli, "dispatch", dispatch)
    return seen


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder as a finished run leaves it, as far as the configuration goes."""
    folder = tmp_path / "finished"
    folder.mkdir()
    save(compose(["model=llama_9m", "optim.lr=0.5", "data.seq_len=96", "run_name=finished"]), folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    "words, task",
    [
        ([], "train"),
        (["train"], "train"),
        (["seed=1"], "train"),
        (["task=train"], "train"),
        (["train", "task=train"], "train"),
        (["data", "prepare", "out=x"], "data_prepare"),
        (["task=data_prepare", "out=x"], "data_prepare"),
    ],
)
def test_verbs_and_the_task_key_are_the_same(words: list[str], task: str, calls: Calls) -> None:
    assert cli.main(words) == 0
    assert [name for name, _ in calls] == [task]


@pytest.mark.parametrize("verb", ["export", "evaluate", "generate"])
def test_verbs_about_a_run_start_from_its_configuration(verb: str, calls: Calls, run_folder: Path) -> None:
    assert cli.main([verb, f"run={run_folder}", "out=hub", "generate.prompt=x"]) == 0
    task, config = calls[0]
    assert (task, config.run, config.out, config.generate.prompt) == (verb, str(run_folder), "hub", "x")
    assert (config.model.name, config.optim.lr, config.run_name) == ("llama_9m", 0.5, "finished")


def test_groups_replace_nodes_of_the_run_but_its_tokenizer_stays(calls: Calls, run_folder: Path) -> None:
    assert cli.main(["evaluate", f"run={run_folder}", "data=c4"]) == 0
    config = calls[0][1]
    assert config.data.name == "c4"
    assert config.data.tokenizer.endswith("data/shakespeare/tokenizer.model")
    assert config.data.seq_len == 96
    assert cli.main(["evaluate", f"run={run_folder}", "data=c4", "data.tokenizer=t", "data.seq_len=64"]) == 0
    assert (calls[1][1].data.tokenizer, calls[1][1].data.seq_len) == ("t", 64)


def test_hugging_face_folder_brings_its_tokenizer(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["evaluate", f"run={tmp_path}"]) == 0
    assert calls[0][1].data.tokenizer == str(tmp_path)
    assert cli.main(["evaluate", f"run={tmp_path}", "data.tokenizer=t"]) == 0
    assert calls[1][1].data.tokenizer == "t"


def test_faults_about_runs(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "run=nowhere"]) == 2
    assert "there is neither config.yaml" in capsys.readouterr().err
    assert cli.main(["evaluate", f"run={run_folder}", "recipe=galore_60m"]) == 2
    assert "leave out recipe=" in capsys.readouterr().err
    text = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(text.replace("seq_len:", "seqlen:"))
    assert cli.main(["evaluate", f"run={run_folder}"]) == 2
    assert "data.seqlen (" in capsys.readouterr().err
    assert cli.main(["train", f"run={run_folder}"]) == 2
    assert f"resume={run_folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, hint",
    [
        (["trainn"], "Did you mean train?"),
        (["exportt", "run=x"], "Did you mean export?"),
        (["data"], "Did you mean data prepare?"),
        (["data", "prepar"], "Did you mean data prepare?"),
        (["train", "extra"], "extra: is not KEY=VALUE"),
        (["export", "task=train"], "leave out one of the two"),
        (["recipes", "galore_6m"], "Did you mean galore_60m?"),
        (["--cfg", "hydra"], "write --cfg job"),
        (["--steps", "100"], "trainer.steps"),
    ],
)
def test_misspelt_verbs(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert hint in capsys.readouterr().err


def test_configuration_is_printed_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--cfg", "job", "seed=7"], ["seed=7", "--cfg=job"], ["train", "seed=7", "-c", "job"]):
        assert cli.main(words) == 0
        assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7


@pytest.mark.parametrize("words", [["help"], ["--help"], ["train", "-h"], ["recipe=nonesuch", "--help"]])
def test_help_names_every_verb_group_and_choice(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    page = capsys.readouterr().out
    assert all(verb.words in page for verb in cli.VERBS)
    assert all(choice in page for group, choices in group_choices().items() if group != "recipe" for choice in choices)
    assert max(len(line) for line in page.splitlines()) <= 120


def test_every_verb_leads_to_a_function() -> None:
    for verb in cli.VERBS:
        module, _, name = verb.function.partition(":")
        path = ROOT / module.replace(".", "/")
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        assert f"def {name}(config: RunConfig) -> int:" in source.read_text(encoding="utf-8")


def fail_with(error: BaseException) -> Callable[[RunConfig], int]:
    def dispatch(config: RunConfig) -> int:
        raise error

    return dispatch


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError is recognised: by its name, so that torch need not be imported to catch it."""


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError(["a: b", "c: d"]), 2, "2 faults:\n- a: b\n- c: d\n"),
        (RunStopped("the loss is not finite", 4), 4, "the loss is not finite\n"),
        (KeyboardInterrupt(), 130, ""),
        (OutOfMemoryError("CUDA out of memory"), 3, "trainer.batch_size"),
        (MemoryError(), 3, "model.activation_checkpointing=true"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "strategy.when=project_in_backward"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5, "No space left on the disk: x\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "dispatch", fail_with(error))
    assert cli.main([]) == code
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EACCES, "x"), AssertionError(), KeyError("x")])
def test_our_own_bugs_are_not_hidden(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "dispatch", fail_with(error))
    with pytest.raises(type(error)):
        cli.main([])


def test_suggestions_for_out_of_memory_are_keys_that_exist() -> None:
    words = [word for line in cli.OUT_OF_MEMORY.splitlines()[1:] for word in line.split() if "=" in word]
    numbers = {"HALF": "2", "THE_SAME": "4", "SMALLER": "8"}
    for number in numbers:
        words = [word.replace(f"={number}", f"={numbers[number]}") for word in words]
    config = compose([*words, "optim.grad_clip=null"])
    assert (config.trainer.batch_size, config.model.activation_checkpointing) == (2, True)


def test_environment_is_set_but_never_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (*cli.ENVIRONMENT, *cli.ALLOCATOR_KEYS):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    cli.set_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The jobs that a sweep starts, instead of running each in a process of its own."""
    seen: list[RunConfig] = []

    def run(words: list[str]) -> int:
        seen.append(compose(words))
        return 4 if seen[-1].seed == 4 else 0

    monkeypatch.setattr(sweeps, "run_apart", run)
    return seen


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_sweep_runs_every_combination_in_a_folder_of_its_own(jobs: list[RunConfig], in_folder: Path) -> None:
    argv = list(sys.argv)
    assert cli.main(["-m", "trainer.threads=1,2", "strategy/subspace=svd,randomized", "seed=1"]) == 0
    assert len(jobs) == len({config.run_name for config in jobs}) == 4
    assert {config.trainer.threads for config in jobs} == {1, 2}
    assert jobs[0].run_name == "llama_1m-galore-shakespeare-trainer.threads=1,strategy_subspace=svd"
    assert sys.argv == argv
    assert Path.cwd() == in_folder


def test_sweep_over_recipes_keeps_what_is_fixed_out_of_the_names(jobs: list[RunConfig], in_folder: Path) -> None:
    assert cli.main(["train", "--multirun", "recipe=default,galore_60m", "seed=3", "run_name=mine"]) == 0
    assert [config.run_name for config in jobs] == ["mine-recipe=default", "mine-recipe=galore_60m"]
    assert {config.seed for config in jobs} == {3}


def test_sweep_is_checked_before_it_starts(
    jobs: list[RunConfig], in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["-m", "optim.lr=1e-3,fast", "strategy=galore,ful", "seed=0", "optim.lrr=1"]) == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in ("optim.lr=fast", "strategy=ful", "Did you mean optim.lr?"))
    assert not jobs
    assert not list(in_folder.iterdir())


def test_sweep_goes_on_after_a_failure_and_returns_the_worst_exit_code(jobs: list[RunConfig], in_folder: Path) -> None:
    assert cli.main(["-m", "seed=4,5"]) == 4
    assert [config.seed for config in jobs] == [4, 5]


def test_job_runs_in_a_process_of_its_own(in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweeps.run_apart(["--cfg", "job", "seed=11"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["seed"] == 11
    assert sweeps.run_apart(["seeed=11"]) == 2


def test_single_run_leaves_nothing_of_hydra_behind(calls: Calls, in_folder: Path) -> None:
    assert cli.main(["seed=1"]) == 0
    assert not list(in_folder.iterdir())


def shell(*words: str, program: tuple[str, ...] = (str(ROOT / "train.py"),), **settings: Any) -> Any:
    return subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, check=False, **settings)


@pytest.mark.parametrize("program", [(str(ROOT / "train.py"),), ("-c", "from lowrank_train.cli import main; main()")])
def test_from_another_folder(program: tuple[str, ...], tmp_path: Path) -> None:
    """Also as the installed command, whose package lies on no path of sys.path."""
    done = shell("--cfg", "job", program=program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(yaml.safe_load(done.stdout)["data"]["tokenizer"]).is_file()
    assert not list(tmp_path.iterdir())


def test_a_fault_is_one_line_on_stderr_and_exit_2(tmp_path: Path) -> None:
    done = shell("optim.lrr=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "- optim.lrr (command line): there is no such key. Did you mean optim.lr?\n"


def test_recipes_are_listed_without_hydra() -> None:
    code = (
        "import sys, time\nfrom lowrank_train.cli import main\nassert main(['recipes']) == 0\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'transformers', 'lightning', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert time.process_time() < 1\n"
    )
    done = shell(program=("-c", code), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "galore_7b_4090" in done.stdout


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'train.py'} recipes | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
