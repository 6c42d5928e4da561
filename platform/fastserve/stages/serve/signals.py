"""What the engine says of itself after every step, kept for the last seconds: for scaling, and to see that it goes on.

It takes the place of one of vLLM's stat loggers, so it costs one call a step and asks the engine nothing.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

WINDOW_SECONDS = 10.0


class Signals:
    """The last state of an engine and its pace. The interface is that of a stat logger of vLLM's manager."""

    def __init__(self, slots: int, now: Callable[[], float] = time.monotonic) -> None:
        """slots: requests that the engine computes at the same time. now: seconds of a clock that never jumps."""
        self.slots = slots
        self._now = now
        self._began = now()
        self._running = 0
        self._waiting = 0
        self._kv_use = 0.0
        self._tokens: deque[tuple[float, int]] = deque()
        self._first: deque[tuple[float, float]] = deque()
        self.moved_at = now()
        """When the engine last got on with its work: a token, or another filling of the KV cache."""

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One step of the engine. Either part may be None."""
        now = self._now()
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            if scheduler_stats.kv_cache_usage != self._kv_use:
                # A long prompt is computed in many steps before its first token.
                self._kv_use, self.moved_at = scheduler_stats.kv_cache_usage, now
        if iteration_stats is not None:
            if iteration_stats.num_generation_tokens or iteration_stats.finished_requests:
                self.moved_at = now
                self._tokens.append((now, iteration_stats.num_generation_tokens))
            self._first.extend((now, seconds) for seconds in iteration_stats.time_to_first_tokens_iter)
        self._forget(now)

    def values(self) -> dict[str, float]:
        """running, waiting: requests. kv_use: share of the KV cache, 0 to 1. ttft_ms: median time to first token of the
        last 10 s, 0 when there was none. tokens_per_s: of the last 10 s. slots: requests at the same time."""
        now = self._now()
        self._forget(now)
        seconds = min(WINDOW_SECONDS, max(1.0, now - self._began))
        first = [seconds for _, seconds in self._first]
        return {
            "running": float(self._running),
            "waiting": float(self._waiting),
            "kv_use": float(self._kv_use),
            "ttft_ms": 1000 * statistics.median(first) if first else 0.0,
            "tokens_per_s": sum(count for _, count in self._tokens) / seconds,
            "slots": float(self.slots),
        }

    def _forget(self, now: float) -> None:
        for kept in (self._tokens, self._first):
            while kept and kept[0][0] < now - WINDOW_SECONDS:
                kept.popleft()

    def log(self) -> None:
        """Nothing is written."""

    def log_engine_initialized(self) -> None:
        """Nothing is written."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """The engine never sleeps."""

    def record_admission_rejection(self, reason: str) -> None:
        """Serve bounds what comes in before the engine would."""
