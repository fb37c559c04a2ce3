"""What a user is told when a model or its weights cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import ModelConfig
from lowrank_train.data.hub import download_command, out_of_reach, why_not


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises for a wrong path or an unsafe file into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        told = why_not(error)
        if "trust_remote_code" in str(error):
            told = "it brings code of its own, which is never run; use a model that transformers itself knows"
        raise UserError(f"{what} cannot be loaded: {told}") from error


@contextmanager
def model_errors(model: ModelConfig) -> Iterator[None]:
    """`user_errors` of model.path, which may be a name on the hub; what is out of reach can be fetched elsewhere."""
    try:
        with user_errors(f"model.path={model.path}"):
            yield
    except UserError as error:
        if not out_of_reach(error):
            raise
        command = download_command(str(model.path), model.revision)
        raise UserError(f"{error}; fetch it where there is a network ({command}), or give a folder") from error


@contextmanager
def allowed_weights(model: ModelConfig) -> Iterator[None]:
    """Say of a folder with nothing but pickles why they are not read, and what to do."""
    try:
        yield
    except OSError as error:
        folder = Path(model.path or "")
        pickles = sorted(file.name for file in folder.glob("*.bin")) if folder.is_dir() else []
        if model.allow_pickle or not pickles or any(folder.glob("*.safetensors")):
            raise
        raise UserError(
            f"model.path={model.path}: has its weights only as a pickle ({pickles[0]}), which can run code when it is "
            "read; convert it to safetensors, or say model.allow_pickle=true where you trust whoever made it"
        ) from error
