"""One measured figure, printed one way by every bench."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with what it should be."""

    name: str
    value: float
    unit: str
    aim: str = ""
    """What the value should be, in words: `< 70`. Empty: shown for information."""

    met: bool | None = None
    """Whether the aim is met; None without an aim."""

    def line(self) -> str:
        """Tab-separated: name, value, unit, aim, `met` or `short` (`-` without an aim)."""
        verdict = {True: "met", False: "short", None: "-"}[self.met]
        return "\t".join((self.name, f"{self.value:.4g}", self.unit, self.aim or "-", verdict))


def below(name: str, value: float, unit: str, limit: float) -> Figure:
    """A figure that should stay under `limit`."""
    return Figure(name, value, unit, f"< {limit:g}", value < limit)


def above(name: str, value: float, unit: str, limit: float) -> Figure:
    """A figure that should be over `limit`."""
    return Figure(name, value, unit, f"> {limit:g}", value > limit)
