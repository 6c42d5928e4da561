"""Counts by the second, so that somebody can ask what happened since a moment, in memory that does not grow.

Times are counted in steps that grow by 4 %: a percentile is right within 2 %, and any number of requests a second
costs at most 400 numbers.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

KEPT_SECONDS = 1200
"""How far back anybody can ask."""

_LEAST_MS = 0.1
_STEP = math.log(1.04)
_STEPS = 400
"""0.1 ms times 1.04^400 are about 11 minutes, longer than any request."""


class Times:
    """How often which time was seen."""

    __slots__ = ("seen", "sum_ms")

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()
        self.sum_ms = 0.0

    def add(self, ms: float) -> None:
        """Count one time."""
        step = math.ceil(math.log(ms / _LEAST_MS) / _STEP) if ms > _LEAST_MS else 0
        self.seen[min(step, _STEPS)] += 1
        self.sum_ms += ms

    def merge(self, other: Times) -> None:
        """Count all that `other` has seen."""
        self.seen.update(other.seen)
        self.sum_ms += other.sum_ms

    @property
    def count(self) -> int:
        """Times seen."""
        return self.seen.total()

    def percentile(self, share: float) -> float | None:
        """Milliseconds that `share` (0 to 1) of all times do not exceed; None without any."""
        left = math.ceil(share * self.count)
        for step in sorted(self.seen):
            left -= self.seen[step]
            if left <= 0:
                return round(_LEAST_MS * math.exp(_STEP * (step - 0.5)), 3)
        return None

    def up_to(self, ms: float) -> int:
        """Times of at most `ms`, within a step."""
        return sum(count for step, count in self.seen.items() if _LEAST_MS * math.exp(_STEP * (step - 0.5)) <= ms)

    def to_json(self) -> dict[str, Any]:
        """Median, 95th percentile in milliseconds, and how many there were."""
        return {"p50": self.percentile(0.5), "p95": self.percentile(0.95), "count": self.count}

    def steps_json(self) -> dict[str, Any]:
        """All that was seen, so that somebody can add it to what another gateway has seen."""
        return {"steps": {str(step): count for step, count in sorted(self.seen.items())}, "sumMs": self.sum_ms}

    @classmethod
    def from_steps(cls, value: Mapping[str, Any]) -> Self:
        """From `steps_json`. Raises ValueError, KeyError, TypeError or AttributeError for something else."""
        found = cls()
        found.seen = Counter({int(step): int(count) for step, count in value["steps"].items()})
        found.sum_ms = float(value["sumMs"])
        return found


@dataclass(slots=True)
class Tally:
    """What was counted in some span of time."""

    second: int = 0
    """Unix second at which the span begins."""

    requests: int = 0
    errors: int = 0
    lost: int = 0
    refused: int = 0
    tokens: int = 0
    each: Times = field(default_factory=Times)
    """Times a token, one for each stream: of its tokens after the first."""

    first: Times = field(default_factory=Times)
    """Times to first event."""

    held: Times = field(default_factory=Times)
    """Times in the hold, of requests that waited there."""

    def merge(self, other: Tally) -> None:
        """Add what `other` has counted."""
        for name in ("requests", "errors", "lost", "refused", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.each.merge(other.each)
        self.first.merge(other.first)
        self.held.merge(other.held)


class Track:
    """The tallies of one thing, second by second, and its sum since the process began."""

    def __init__(self) -> None:
        self.total = Tally()
        self.running = 0
        self._seconds: deque[Tally] = deque()

    def at(self, second: int) -> tuple[Tally, Tally]:
        """The two tallies in which to count what happens in this second."""
        if not self._seconds or self._seconds[-1].second < second:
            self._seconds.append(Tally(second))
            while self._seconds[0].second <= second - KEPT_SECONDS:
                self._seconds.popleft()
        return self._seconds[-1], self.total

    def since(self, second: int) -> Tally:
        """The sum from this second on."""
        whole = Tally(second)
        for tally in self._seconds:
            if tally.second >= second:
                whole.merge(tally)
        return whole

    def is_over(self, second: int) -> bool:
        """Whether it runs no longer, and nothing of it can be asked for any more."""
        return not self.running and (not self._seconds or self._seconds[-1].second <= second - KEPT_SECONDS)
