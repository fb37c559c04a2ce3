"""Every method as a plain torch optimizer, under the option names of its published code."""

from lowrank_train.published.entry import METHODS, optimizer

__all__ = ["METHODS", "optimizer"]
