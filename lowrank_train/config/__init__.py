"""The configuration: schema, composition and checks; importable without torch, and without hydra until it composes."""

from lowrank_train.config.composing import compose
from lowrank_train.config.errors import RunStopped, UserError
from lowrank_train.config.files import load, save, to_container, to_yaml
from lowrank_train.config.parts import instantiate
from lowrank_train.config.schema import RunConfig

__all__ = ["RunConfig", "RunStopped", "UserError", "compose", "instantiate", "load", "save", "to_container", "to_yaml"]
