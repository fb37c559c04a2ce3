"""Train language models in little memory: every method a point on a few independent axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_train.published import optimizer, reparametrise, schedule

__version__ = "0.1.0"
__all__ = ["__version__", "optimizer", "reparametrise", "schedule"]


def __getattr__(name: str) -> Any:
    """What the library offers, found when it is asked for: the command line starts without torch."""
    if name in __all__:
        from lowrank_train import published

        return getattr(published, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
