"""What happens between updates: merges, re-decompositions, new samples; when follows from the update's number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from lowrank_train.nn.reparam import ReparamLinear


class Moments(Protocol):
    """What an event may do to the optimizer's memory of a parameter."""

    def forget(self, param: nn.Parameter) -> None:
        """Drop it whole, step count included: the next update treats the parameter as new."""

    def mask(self, param: nn.Parameter, keep: Callable[[str, Tensor], Tensor]) -> None:
        """Multiply each moment with keep(its name, itself), zeros and ones; the step count goes on."""

    def lr(self, param: nn.Parameter) -> float:
        """The learning rate of the update just made."""


Action = Callable[[int, "Mapping[str, ReparamLinear]", Moments], str | None]
"""(number of the event, counted from 1; module name -> layer; moments), changed in place. What it returns, if anything,
is what the log calls it in place of the event's name, also where the event is quiet: for what happens now and then."""


Layer = TypeVar("Layer", bound="ReparamLinear")


def each(kind: type[Layer], act: Callable[[Layer, int, Moments], None]) -> Action:
    """The action that does act(layer, number, moments) with every layer, all of which are of one kind."""

    def run(number: int, layers: Mapping[str, ReparamLinear], moments: Moments) -> None:
        for layer in layers.values():
            assert isinstance(layer, kind)
            act(layer, number, moments)

    return run


@dataclass(frozen=True)
class Event:
    """Something that happens to the reparametrised layers after certain updates.

    It is due after update `first` and then after every `every` updates, or only once where `every` is None. All that
    it draws comes from the seed, the layer's name and the event's number, so that ranks and resumed runs agree.
    """

    name: str  # as the log and the picture call it
    run: Action
    first: int
    every: int | None = None
    quiet: bool = False  # too frequent to be worth a line in the log
    together: bool = False  # looks at all layers at once, and there at buffers alone, which every rank has whole
    of_trained: bool = False  # looks at no parameter that is not trained, so that those need not be whole
    restructures: bool = False  # parameters come, go or change their shape, which several devices cannot follow

    def due(self, step: int) -> bool:
        """Whether it happens after update number `step`, counted from 1."""
        if self.every is None:
            return step == self.first
        return step >= self.first and (step - self.first) % self.every == 0

    def number(self, step: int) -> int:
        """How many times it has happened by then, this one included."""
        return 1 if self.every is None else (step - self.first) // self.every + 1


Layerwise = Callable[
    [Event, "Mapping[str, ReparamLinear]", Moments], "Iterator[tuple[Mapping[str, ReparamLinear], Moments]]"
]
"""How an event goes through the layers: all of them at once, or in parts, each with the moments that belong to it."""


def at_once(
    event: Event, layers: Mapping[str, ReparamLinear], moments: Moments
) -> Iterator[tuple[Mapping[str, ReparamLinear], Moments]]:
    """All layers, where they are."""
    yield layers, moments
