"""Parts that contradict each other are refused when they are put together, with the reason and the way out."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_train.optim.adafactor import Adafactor
from lowrank_train.optim.feedback import ErrorFeedback
from lowrank_train.optim.flora import Flora
from lowrank_train.optim.in_subspace import InSubspace
from lowrank_train.optim.lift import (
    Backproject,
    ScaledGradient,
    ScaledResidual,
    SignOfBackprojection,
    StateFreeResidual,
)
from lowrank_train.optim.moments import Adam, Lion, Momentum
from lowrank_train.optim.refusals import refuse_impossible
from lowrank_train.optim.subspace.coordinates import Coordinates
from lowrank_train.optim.subspace.online import Online
from lowrank_train.optim.subspace.power import Power
from lowrank_train.optim.subspace.random import Gaussian, Orthonormal
from lowrank_train.optim.subspace.svd import Svd

ADAM, BACK = Adam(), Backproject()
RESIDUAL, PAPER = StateFreeResidual(), ScaledResidual(form="paper")

REFUSED_AND_ALLOWED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("not orthonormal", {"subspace": Gaussian(2), "lift": RESIDUAL}, {"subspace": Orthonormal(2), "lift": RESIDUAL}),
    ("not orthonormal", {"subspace": Online(2), "lift": RESIDUAL}, {"subspace": Svd(2), "lift": RESIDUAL}),
    ("not orthonormal", {"subspace": Gaussian(2), "lift": PAPER}, {"subspace": Gaussian(2), "lift": ScaledResidual()}),
    ("without bound", {"subspace": Gaussian(2), "feedback": ErrorFeedback()}, {"subspace": Gaussian(2)}),
    ("without bound", {"subspace": Online(2), "feedback": ErrorFeedback()}, {"feedback": ErrorFeedback()}),
    ("leaves none", {"subspace": Svd(2, side="full"), "lift": ScaledGradient()}, {"lift": ScaledGradient()}),
    (
        "leaves none",
        {"subspace": Coordinates(of="entries"), "lift": ScaledResidual()},
        {"subspace": Coordinates(of="rows"), "lift": ScaledResidual()},
    ),
    ("no change of coordinates", {"subspace": Online(2), "on_refresh": "rotate"}, {"on_refresh": "rotate"}),
    (
        "no change of coordinates",
        {"subspace": Gaussian(2), "on_refresh": "rotate"},
        {"subspace": Svd(2, side="full"), "on_refresh": "rotate"},
    ),
    ("Adafactor has no way", {"inner": Adafactor(), "on_refresh": "rotate"}, {"inner": Lion(), "on_refresh": "rotate"}),
    ("keeps no exp_avg", {"subspace": Power(2), "inner": Momentum()}, {"subspace": Power(2)}),
    ("keeps no step", {"subspace": Power(2), "inner": Lion()}, {"subspace": Svd(2), "inner": Lion()}),
    ("would empty", {"subspace": Power(2), "on_refresh": "reset"}, {"subspace": Svd(2), "on_refresh": "reset"}),
    ("takes none", {"inner": Lion(signed=False)}, {"inner": Lion(signed=False), "lift": SignOfBackprojection()}),
    ("taken one already", {"inner": Lion(), "lift": SignOfBackprojection()}, {"lift": SignOfBackprojection()}),
    ("compresses the gradient itself", {"inner": Flora()}, {"inner": Adafactor()}),
]


def composed(**parts: Any) -> InSubspace:
    return InSubspace(**({"subspace": Svd(2), "inner": ADAM, "lift": BACK} | parts))


@pytest.mark.parametrize(
    "reason, refused, allowed", REFUSED_AND_ALLOWED, ids=[reason for reason, *_ in REFUSED_AND_ALLOWED]
)
def test_refused_with_a_reason(reason: str, refused: dict[str, Any], allowed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        composed(**refused)
    assert str(caught.value).startswith("strategy.")
    composed(**allowed)


def test_error_feedback_accumulates_no_micro_batches() -> None:
    """Compression with an error is not linear: the error would be added to every micro-batch."""
    assert not composed(feedback=ErrorFeedback()).accumulates
    settings: dict[str, Any] = {"clipped": False, "clip_norm_of": "full", "needs_gradient": False, "accumulates": False}
    refuse_impossible("project_in_backward", micro_batches=1, **settings)
    refuse_impossible("after_backward", micro_batches=2, **settings)
    with pytest.raises(ValueError, match="error to each of 2"):
        refuse_impossible("project_in_backward", micro_batches=2, **settings)
