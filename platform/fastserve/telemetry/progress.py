"""Progress of a stage as plain values, written at most a few times a second wherever the stage's store is.

A live bar, `fastserve status` and the operator all read the same small object, so a stage needs no connection to
whoever is watching, and a watcher that comes late sees as much as one that was there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

RATE_WINDOW_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is."""

    done: float
    total: float
    unit: str
    """What is counted: steps, rows, bytes, layers."""

    rate_per_second: float | None = None
    eta_seconds: float | None = None
    note: str = ""
    """What is being done now, in a few words."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    at: float = 0.0
    """Unix seconds of the last update."""

    def to_json(self) -> dict[str, Any]:
        """Plain values with camelCase keys."""
        return {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "ratePerSecond": self.rate_per_second,
            "etaSeconds": self.eta_seconds,
            "note": self.note,
            "metrics": dict(self.metrics),
            "at": self.at,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Back from plain values."""
        return cls(
            done=value["done"],
            total=value["total"],
            unit=value["unit"],
            rate_per_second=value.get("ratePerSecond"),
            eta_seconds=value.get("etaSeconds"),
            note=value.get("note", ""),
            metrics=value.get("metrics", {}),
            at=value.get("at", 0.0),
        )


class Reporter:
    """Turns counts into progress with a rate and an ETA, and hands it on at most every `min_interval_seconds`.

    Safe to use from several threads.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        min_interval_seconds: float = 0.5,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._min_interval_seconds = min_interval_seconds
        self._now = now
        self._seen: deque[tuple[float, float]] = deque()
        self._written_at = float("-inf")
        self._last: Progress | None = None
        self._metrics: dict[str, Any] = {}
        self._lock = threading.Lock()

    def update(self, done: float, total: float, unit: str, note: str = "", **metrics: Any) -> Progress:
        """Report that `done` of `total` `unit` are done. Metrics are kept until they are given anew."""
        with self._lock:
            return self._take(done, total, unit, note, metrics)

    def _take(self, done: float, total: float, unit: str, note: str, metrics: Mapping[str, Any]) -> Progress:
        now = self._now()
        if self._last is not None and (unit != self._last.unit or done < self._last.done):
            self._seen.clear()  # another thing is counted now: its rate starts afresh
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > RATE_WINDOW_SECONDS:
            self._seen.popleft()
        began_at, began_done = self._seen[0]
        rate = (done - began_done) / (now - began_at) if now > began_at and done > began_done else None
        self._metrics.update(metrics)
        self._last = Progress(
            done=done,
            total=total,
            unit=unit,
            rate_per_second=rate,
            eta_seconds=(total - done) / rate if rate else None,
            note=note,
            metrics=dict(self._metrics),
            at=now,
        )
        if now - self._written_at >= self._min_interval_seconds or done >= total:
            self._flush()
        return self._last

    def close(self) -> None:
        """Hand on the last update if it was held back."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._last is not None and self._last.at > self._written_at:
            self._write(self._last.to_json())
            self._written_at = self._last.at
