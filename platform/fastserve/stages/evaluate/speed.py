"""Tokens a second of two models against each other, in one run.

A machine's speed changes from minute to minute, so one model after the other measures the machine. Rounds alternate,
the order within a pair alternates too, and only ratios of neighbouring rounds are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from fastserve.plan.gate import Interval
from fastserve.stages.evaluate.intervals import ratio_of_rounds

ROUNDS = 5
STREAMS = 8
TOKENS = 32

TimedRound = Callable[[], float]
"""Generates a fixed number of tokens; returns tokens a second."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens a second by round, shape [rounds]."""

    parent: Sequence[float]
    candidate: Sequence[float]

    @property
    def speedup(self) -> Interval:
        """Candidate against parent."""
        return ratio_of_rounds(self.candidate, self.parent)


def interleaved(
    parent: TimedRound, candidate: TimedRound, rounds: int = ROUNDS, done: Callable[[], None] = lambda: None
) -> Speeds:
    """Alternate `rounds` timed rounds of both, after one of each that is not counted.

    done: called after every round.
    """
    timed = {"parent": parent, "candidate": candidate}
    found: dict[str, list[float]] = {"parent": [], "candidate": []}
    for number in range(rounds + 1):
        order = ("parent", "candidate") if number % 2 else ("candidate", "parent")
        for role in order:
            speed = timed[role]()
            done()
            if number:  # the first fills caches and starts threads
                found[role].append(speed)
    return Speeds(found["parent"], found["candidate"])


def alone(candidate: TimedRound, rounds: int = 3, done: Callable[[], None] = lambda: None) -> float:
    """Median tokens a second of one model."""
    speeds = []
    for number in range(rounds + 1):
        speed = candidate()
        done()
        if number:
            speeds.append(speed)
    return median(speeds)
