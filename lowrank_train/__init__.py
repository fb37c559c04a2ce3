"""Train language models in little memory: every method a point on a few independent axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_train.published import optimizer

__version__ = "0.1.0"
__all__ = ["__version__", "optimizer"]


def __getattr__(name: str) -> Any:
    """`lowrank_train.optimizer`, found when it is asked for: the command line starts without torch."""
    if name == "optimizer":
        from lowrank_train.published import optimizer

        return optimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
