"""What cannot be had together when gradients are freed before the step is taken."""

from __future__ import annotations

from typing import Literal

When = Literal["after_backward", "project_in_backward", "in_backward"]


def refuse_impossible(
    when: When, *, clipped: bool, clip_norm_of: str, micro_batches: int, needs_gradient: bool, accumulates: bool
) -> None:
    """ValueError, with the ways out, for a moment of stepping that does not go with the rest."""
    if when == "in_backward" and micro_batches > 1:
        raise ValueError(
            f"when=in_backward steps inside every backward pass and cannot accumulate {micro_batches} "
            "micro-batches; use when=project_in_backward, or one larger micro-batch"
        )
    if when == "in_backward" and clipped:
        raise ValueError(
            "when=in_backward frees each gradient before the global norm is known and cannot clip by it; "
            "use when=project_in_backward or when=after_backward, or set grad_clip to none"
        )
    if when == "project_in_backward":
        if clipped and micro_batches > 1 and clip_norm_of == "full":
            raise ValueError(
                "the norm of a sum of gradients that were freed one by one cannot be known; set "
                "clip_norm_of=projected, or when=after_backward, or a single micro-batch"
            )
        if micro_batches > 1 and not accumulates:
            raise ValueError(
                "when=project_in_backward compresses every micro-batch by itself, and error feedback would add the "
                f"error to each of {micro_batches}; use when=after_backward, or a single micro-batch"
            )
        if needs_gradient:
            raise ValueError(
                "when=project_in_backward frees the full gradient, but the lift uses what the subspace left out; "
                "use when=after_backward or when=in_backward"
            )
