"""What came of the jobs of a sweep, a file for each in the sweep's folder: jobs may run in other places."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

JOBS = "jobs"


@dataclass(frozen=True)
class Job:
    """One job: its run folder (None where it does not train), and its exit code once it has one."""

    run: str | None
    exit_code: int | None

    def record(self, sweep_folder: Path, number: int) -> None:
        """Write it down, as a whole or not at all."""
        file = sweep_folder / JOBS / f"{number:04}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        aside.replace(file)


def is_sweep_folder(folder: Path) -> bool:
    """Whether jobs were recorded there."""
    return (folder / JOBS).is_dir()


def forget_jobs(sweep_folder: Path) -> None:
    """Remove all records."""
    shutil.rmtree(sweep_folder / JOBS, ignore_errors=True)


def recorded_jobs(sweep_folder: Path) -> list[Job]:
    """Those that have begun, in their order."""
    files = sorted((sweep_folder / JOBS).glob("*.json"))
    return [Job(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def run_folders(sweep_folder: Path) -> list[Path]:
    """The run folders of the jobs that train."""
    return [Path(job.run) for job in recorded_jobs(sweep_folder) if job.run is not None]
