"""Every method as a plain torch optimizer or a swap of layers, and the schedules, by the names of published code."""

from lowrank_train.published.entry import METHODS, optimizer
from lowrank_train.published.reparam import reparametrise
from lowrank_train.published.schedules import schedule

__all__ = ["METHODS", "optimizer", "reparametrise", "schedule"]
