"""A configuration as a plain container and as a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lowrank_train.config.errors import UserError
from lowrank_train.config.schema import RunConfig
from lowrank_train.config.validate import build


def to_container(config: RunConfig) -> dict[str, Any]:
    """Dicts, lists, numbers and texts only: what YAML, JSON and checkpoints may hold."""
    return _plain(dataclasses.asdict(config))


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list | tuple) else node


def to_yaml(config: RunConfig) -> str:
    """Every key with its value, in the order of the schema."""
    import yaml  # omegaconf's own dependency, read only where YAML is

    return yaml.safe_dump(to_container(config), sort_keys=False, allow_unicode=True, width=120)


def save(config: RunConfig, path: str | Path) -> None:
    """Write every key with its value."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def load_container(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError with file and line where it is none."""
    import yaml
    from omegaconf import OmegaConf  # reads 1e-3 as a number, which YAML 1.1 alone does not

    try:
        node = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.YAMLError as error:
        raise UserError(yaml_fault(error, str(path))) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(node, dict):
        raise UserError(f"{path}: holds no keys")
    return {str(key): value for key, value in node.items()}


def yaml_fault(error: Exception, path: str) -> str:
    """What is wrong with a YAML file, with the line."""
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark else ""
    return f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"


def load(path: str | Path) -> RunConfig:
    """The configuration in a file that `save` wrote; raises UserError with all its faults."""
    config, faults = build(load_container(path))
    if config is None:
        raise UserError([fault.sentence(str(path)) for fault in faults])
    return config
