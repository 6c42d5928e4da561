"""Which level of a multi-level feedback queue a request is at, and when that changes.

Nobody knows beforehand how long an answer will be. So every request starts near the top, where short ones end, and
sinks as it produces tokens; a long prompt says enough about itself to skip the top. Pure values: no engine, no clock.

Source: Wu et al., FastServe (skip-join MLFQ), arXiv 2305.05920, section 4.1.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

GROWTH = 4
"""How many times longer a request may stay at a level than at the one above. Few and steep levels: many flat ones take
turns among equally long requests, which helps none of them."""

PROMPT_TOKENS_PER_TOKEN = 64
"""Prompt tokens that cost about as much as one token of an answer, since a prompt is computed many tokens at once."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of one engine. Level 0 goes first; who is at the last one stays there."""

    count: int = 3
    quantum: float | None = None
    """Tokens that a request may produce at level 0. None: learned from the answers of this engine (`Lengths`)."""

    starvation_seconds: float = 30.0
    """Longest time without a token before a waiting request goes back to level 0."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From the engine's `additional_config`, in the manifest's keys; what is left out has its default."""
        default = cls()
        return cls(
            int(value.get("levels", default.count)),
            value.get("quantum"),
            float(value.get("starvation", default.starvation_seconds)),
        )

    def quantum_of(self, level: int) -> float:
        """Tokens that a request may produce at `level`; without end at the last one, and while nothing is known."""
        if self.quantum is None or level >= self.count - 1:
            return math.inf
        return self.quantum * float(GROWTH**level)

    def join(self, prompt_tokens: int) -> int:
        """The level that a new request starts at: the first whose quantum its prompt does not use up alone."""
        cost = prompt_tokens / PROMPT_TOKENS_PER_TOKEN
        return next(level for level in range(self.count) if cost <= self.quantum_of(level))

    def class_of(self, place: Place) -> int:
        """One number to sort by, the smallest goes first: the tenant's priority above the level."""
        return place.priority * self.count + place.level


@dataclass(slots=True)
class Place:
    """Where one request is in the queue."""

    priority: int
    """The tenant's: a smaller one goes first, at any level."""

    level: int
    mark: int = 0
    """Tokens it had produced when it came to this level."""

    produced: int = 0
    """Tokens it had produced when it was last looked at."""

    since: float = 0.0
    """When it began to go without a token; of a running request the value is an old one."""

    def sink(self, levels: Levels, produced: int) -> bool:
        """Go one level down when the quantum is used up; whether that happened."""
        if produced - self.mark < levels.quantum_of(self.level):
            return False
        self.level += 1
        self.mark = produced
        return True

    def rise(self) -> None:
        """Go back to level 0, with a whole quantum."""
        self.level = 0
        self.mark = self.produced

    def stop(self, produced: int, now: float) -> None:
        """It waits from now on. Who was stopped before a token came has been without one for longer than that."""
        if produced > self.produced:
            self.since = now
        self.produced = produced


class Lengths:
    """Learns from the answers that ended how many tokens tell a long one from the rest.

    A request should give way from the age on at which it is less likely to end with its next token than a new one is
    on the average: at which the hazard of the lengths falls below one over their mean. That is where
    E[max(L - q, 0)] - E[L] P(L > q), the tokens that those beyond q still have to come above what as many new ones
    have, is largest (compare the Gittins index: Aalto, Ayesta, Righter, 2009). When that is small beside E[L], as with
    lengths that are alike, there is nothing to gain and much to lose: then only who is longer than all known
    answers sinks.
    """

    WINDOW = 256
    """Answers that are remembered."""

    LEAST = 16
    """Answers before anything is said; until then nobody sinks."""

    GAIN = 0.08
    """Least gain, as a share of the mean length. Two kinds of answers show 0.6, a lognormal tail 0.1 to 0.3, lengths
    that are alike next to nothing; lengths without memory (exponential) show up to 0.1 by chance."""

    SLACK = 1.25
    """How far beyond every known answer one must be to sink, where there is nothing to gain."""

    def __init__(self) -> None:
        self._known: deque[int] = deque(maxlen=self.WINDOW)
        self._new = 0

    def add(self, tokens: int) -> bool:
        """An answer ended by itself after `tokens`; whether it is time to ask for the quantum again."""
        if tokens > 0:
            self._known.append(tokens)
            self._new += 1
        if len(self._known) < self.LEAST or self._new * 16 < len(self._known):
            return False
        self._new = 0
        return True

    def quantum(self) -> int:
        """Tokens after which an answer counts as long."""
        lengths = sorted(self._known)
        mean = sum(lengths) / len(lengths)
        best, gain = math.ceil(self.SLACK * lengths[-1]), self.GAIN * mean * len(lengths)
        beyond, tokens = 0, 0
        for length in reversed(lengths):
            excess = tokens - length * beyond - mean * beyond
            if excess > gain:
                best, gain = length, excess
            beyond, tokens = beyond + 1, tokens + length
        return best


class Waits:
    """Who has gone without a token for how long; asking costs nothing while nobody starves."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, name: str, since: float) -> None:
        """Request `name` waits; it got its last token, or arrived, at `since`."""
        heapq.heappush(self._heap, (since, name))

    def pop(self, before: float) -> list[tuple[str, float]]:
        """Everybody added with a `since` earlier than `before`, as (name, since); each is told once.

        Some may have moved on by now: whoever asks compares `since` with the request's own.
        """
        found = []
        while self._heap and self._heap[0][0] < before:
            since, name = heapq.heappop(self._heap)
            found.append((name, since))
        return found
