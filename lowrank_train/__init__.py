"""Train language models in little memory: every method a point on a few independent axes."""

__version__ = "0.1.0"
