"""Which parts of a composition contradict each other, and why; everything else may be combined freely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowrank_train.optim.moments import Lion
from lowrank_train.optim.subspace.base import Subspace
from lowrank_train.optim.transform import Slot, Transform

if TYPE_CHECKING:
    from lowrank_train.optim.feedback import ErrorFeedback
    from lowrank_train.optim.lift import Lift

PROBE_SHAPE = (128, 128)  # large enough for whatever is stored otherwise from a certain size on
PROBE_SLOT = Slot("", 0, 0.0, torch.float32)


def refuse_contradictions(
    subspace: Subspace, inner: Transform, lift: Lift, on_refresh: str, feedback: ErrorFeedback | None
) -> None:
    """ValueError, with the reason and the way out, for parts that cannot work together."""
    if lift.comes_first:
        _refuse_lift_first(subspace, inner, lift, on_refresh, feedback)
        return
    if inner.needs_gradient or inner.compresses:
        raise ValueError(
            f"strategy.inner: {_name(inner)} compresses the gradient itself and cannot run inside a subspace; make it "
            "the rule for all parameters with strategy/rest, without strategy.subspace"
        )
    if _unwrapped(inner).reads_weights:
        raise ValueError(
            f"strategy.inner: {_name(inner)} looks at the weights, of which a subspace has no small copy; run it on "
            "whole tensors, with ~strategy.subspace ~strategy.lift or as strategy/rest, or choose another rule"
        )
    if _unwrapped(inner).needs_lines and not _leaves_lines(subspace):
        raise ValueError(
            f"strategy.inner: {_name(inner)} keeps a second moment for each line that the subspace leaves "
            f"uncompressed, and {_name(subspace)} leaves none; use strategy.subspace.side=std, or of=columns where it "
            "takes coordinates"
        )
    _refuse_lift(subspace, inner, lift)
    if feedback is not None and not type(subspace).orthonormal:
        raise ValueError(
            "strategy.feedback: adds what the subspace left out to the next gradient, but the basis of "
            f"{_name(subspace)} is not orthonormal: it does not tell what it kept from what it left out, and the error "
            "grows without bound; use an orthonormal one such as strategy/subspace=orthonormal, or drop it with "
            "~strategy.feedback"
        )
    if on_refresh == "rotate":
        _refuse_rotation(subspace, inner)
    if feedback is not None and feedback.momentum:
        _refuse_feedback_of_codes(inner)
    needed = type(subspace).needs_state
    if needed:
        _refuse_missing_state(subspace, inner, needed, on_refresh)


def _refuse_lift_first(
    subspace: Subspace, inner: Transform, lift: Lift, on_refresh: str, feedback: ErrorFeedback | None
) -> None:
    """The inner rule sees whole matrices, so that nothing of it has to do with the basis."""
    reason = None
    if inner.compresses:
        reason = f"{_name(inner)} compresses what has been brought back whole again; choose another inner rule"
    elif on_refresh != "keep":
        reason = f"its state has no basis that could move; use strategy.on_refresh=keep, not {on_refresh}"
    elif type(subspace).needs_state:
        reason = f"{_name(subspace)} moves by a first moment in the subspace; choose another, such as gaussian"
    elif feedback is not None:
        reason = "there is no residual to feed back that the next gradients could use; drop it with ~strategy.feedback"
    elif isinstance(inner, Lion) and not inner.signed:
        reason = "it takes no sign for Lion; set strategy.inner.signed=true"
    if reason is not None:
        raise ValueError(f"strategy.lift: {_name(lift)} lets {_name(inner)} work on whole matrices, and {reason}")


def _refuse_lift(subspace: Subspace, inner: Transform, lift: Lift) -> None:
    if lift.needs_projection and not type(subspace).orthonormal:
        raise ValueError(
            f"strategy.lift: {_name(lift)} steps along what the subspace left out, but the basis of {_name(subspace)} "
            "is not orthonormal, and G - up(down(G)) is then larger than what was left out; use an orthonormal one, "
            "such as strategy/subspace=orthonormal, or strategy/lift=backproject"
        )
    if lift.needs_lines and not _leaves_lines(subspace):
        raise ValueError(
            f"strategy.lift: {_name(lift)} scales the lines that the subspace leaves uncompressed, and "
            f"{_name(subspace)} leaves none; use strategy.subspace.side=std, or of=columns where it takes coordinates"
        )
    unsigned = isinstance(inner, Lion) and not inner.signed
    if unsigned and not lift.takes_sign and not lift.needs_lines:
        raise ValueError(
            f"strategy.inner.signed=false: leaves the sign to the lift, and {_name(lift)} takes none; set "
            "strategy.inner.signed=true, or strategy/lift=sign_of_backprojection"
        )
    if isinstance(inner, Lion) and inner.signed and lift.takes_sign:
        raise ValueError(
            f"strategy.lift: {_name(lift)} takes the sign of the whole matrix, and Lion has taken one already; set "
            "strategy.inner.signed=false, or strategy/lift=backproject"
        )


def _refuse_rotation(subspace: Subspace, inner: Transform) -> None:
    reason = None
    if not type(subspace).orthonormal:
        reason = f"the basis of {_name(subspace)} is not orthonormal, so B_new^T B_old is no change of coordinates"
    elif type(subspace).change is Subspace.change:
        reason = f"the subspace {_name(subspace)} cannot tell its new coordinates from its old ones"
    elif type(_unwrapped(inner)).rotate is Transform.rotate:
        reason = f"{_name(inner)} has no way to carry its state over to a new basis"
    if reason is not None:
        raise ValueError(f"strategy.on_refresh=rotate: {reason}; use keep or reset")


def _refuse_missing_state(subspace: Subspace, inner: Transform, needed: frozenset[str], on_refresh: str) -> None:
    probe = torch.empty(PROBE_SHAPE, device="meta")
    missing = needed - inner.init(probe, PROBE_SLOT).keys()
    if missing:
        raise ValueError(
            f"strategy.subspace: {_name(subspace)} moves by the first moment of the inner rule, and {_name(inner)} "
            f"keeps no {' or '.join(sorted(missing))} that it could read; use strategy/inner=adamw, with "
            "strategy.storage.first=fp32 where there is a storage, or another subspace"
        )
    if on_refresh == "reset":
        raise ValueError(
            f"strategy.on_refresh=reset: {_name(subspace)} moves by the first moment of the inner rule, which a reset "
            "would empty; use keep or rotate"
        )


def _refuse_feedback_of_codes(inner: Transform) -> None:
    if "exp_avg" not in inner.init(torch.empty(PROBE_SHAPE, device="meta"), PROBE_SLOT):
        raise ValueError(
            f"strategy.feedback.momentum: feeds back what a rotation takes from the first moment, and {_name(inner)} "
            "keeps none that it could read; set it to 0, or strategy.storage.first=fp32, which leaves codes to all else"
        )


def _leaves_lines(subspace: Subspace) -> bool:
    probe = torch.empty(PROBE_SHAPE, device="meta")
    return subspace.side_of(subspace.init(probe, PROBE_SLOT), probe.shape) != "both"


def _unwrapped(inner: Transform) -> Transform:
    """The rule itself, where another one only stores its state."""
    wrapped = getattr(inner, "inner", inner)
    return wrapped if isinstance(wrapped, Transform) else inner


def _name(part: object) -> str:
    return type(_unwrapped(part) if isinstance(part, Transform) else part).__name__
