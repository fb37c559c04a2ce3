"""result.json: what came out of a run and everything needed to compare it with another."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PROJECT_ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "lightning", "transformers", "tokenizers", "sentencepiece", "datasets", "numpy")


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write aside and rename, so that a reader never meets half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that move numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware(device: torch.device, name: str, world_size: int) -> dict[str, Any]:
    """The machine in words and numbers."""
    return {
        "device": name,
        "kind": device.type,
        "devices": world_size,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def project_commit() -> tuple[str | None, bool | None]:
    """The git commit of the project's checkout and whether files differ from it; (None, None) without a checkout."""
    if not (PROJECT_ROOT / ".git").exists():
        return None, None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
