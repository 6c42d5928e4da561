"""Looks that do not wait for each other: each has a thread of its own, and one that hangs is left alone until it ends.

A store, a Ray head or a namespace may answer slowly or not at all. Whoever looks at several asks for all of them at
once, waits a little, and goes on with those that are done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from fastserve_operator.conditions import attempted

AT_ONCE = 64
"""Looks at the same time; more wait for the next round."""

PATIENCE_SECONDS = 10.0
"""How long a round waits for its looks. One that takes longer goes on, and its result comes with a later round."""

SLOW_SECONDS = 60.0
"""A look that takes longer is told of in the log, once."""

log = logging.getLogger("fastserve.operator")


@dataclass(slots=True)
class _Look:
    future: Future[Any]
    began_at: float
    told: bool = False


class Rounds:
    """Rounds of looks by name; no two looks of one name run at the same time."""

    def __init__(
        self,
        at_once: int = AT_ONCE,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds that never go back."""
        self._at_once = at_once
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._running: dict[str, _Look] = {}
        self._turn = 0

    def go(self, names: Iterable[str], look: Callable[[str], Any]) -> dict[str, Any]:
        """Begin a look at each name that none is under way of, and wait for these a little. Returns what those that
        ended returned, earlier ones included, or the Trouble that they met, by name."""
        wanted = [name for name in names if name not in self._running]
        room = max(0, self._at_once - len(self._running))
        if len(wanted) > room:  # who was left out comes first in the next round
            start = self._turn % len(wanted)
            wanted = [*wanted[start:], *wanted[:start]][:room]
            self._turn += room
        for name in wanted:
            self._running[name] = _Look(_in_a_thread(name, look), self._clock())
        wait([self._running[name].future for name in wanted], timeout=self._patience_seconds)
        ended = {name: item.future.result() for name, item in self._running.items() if item.future.done()}
        for name in ended:
            del self._running[name]
        self._tell_of_slow_ones()
        return ended

    @property
    def under_way(self) -> list[str]:
        """Names whose look has not ended yet."""
        return sorted(self._running)

    def close(self, seconds: float) -> None:
        """Wait for what is under way, but not longer than this."""
        wait([item.future for item in self._running.values()], timeout=seconds)

    def _tell_of_slow_ones(self) -> None:
        for name, item in self._running.items():
            if not item.told and self._clock() > item.began_at + SLOW_SECONDS:
                item.told = True
                log.warning("%s: its look takes more than %.0f s; the others go on", name, SLOW_SECONDS)


def _in_a_thread(name: str, look: Callable[[str], Any]) -> Future[Any]:
    """Run it in a daemon thread, so that one that hangs keeps no process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        future.set_result(attempted(lambda: look(name)))

    threading.Thread(target=run, name=f"look {name}", daemon=True).start()
    return future
