"""What a probe says: a line with a verdict, and with the way out where there is something wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line. A note costs speed or a choice, a fault keeps a run from going as it should."""

    part: str
    verdict: Verdict
    found: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.verdict:<5}  {self.part:<16}  {self.found}" + (f"; {self.fix}" if self.fix else "")


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
