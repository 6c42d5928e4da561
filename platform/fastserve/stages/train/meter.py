"""Where each worker's time goes, step by step: computing, waiting for data, standing still for the others.

Every worker times itself; the times are gathered together with the losses, so all know all of them and come to the same
new shares. What is averaged is the time of a token, not its inverse: a worker that becomes slow is then seen at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Cause = Literal["compute", "data", "network"]

NEWEST = 0.6
"""Weight of the newest step in the averages."""

SLOW = 1.4
"""A worker is called slow when its time of a token has grown by so much more than everybody's has."""

OF_DATA = 0.25
"""Part of a slow worker's own time that is spent on data, from which on data are the cause."""

MOST_DATA = 0.5
"""Such a part is named even when all workers suffer alike."""

OF_NETWORK = 0.35
"""Part of a step in which even the busiest worker stands still, from which on the network is looked at."""

ASK_EVERY = 20
"""Steps between two looks at the network."""

FORGIVES = 0.9
"""What becomes of a worker's time of a token in each step in which it has none."""

SETTLES_AFTER = 2
"""Steps after a start in which kernels and buffers are still made; they are not counted."""


@dataclass(frozen=True, slots=True)
class Times:
    """One worker's seconds in one step."""

    wall: float
    data: float
    """Waiting for its samples."""

    collective: float
    """Standing still for the others, and for what they send."""

    tokens: float
    """Tokens that it computed."""

    micro_batches: float = 1.0
    """In how many pieces."""

    optimizer: float = 0.0
    """In the optimizer's step, which is not part of `wall`: it goes by the share of the state, not of the batch."""

    @property
    def computing(self) -> float:
        """Seconds in which the others may have waited for its forward and backward."""
        return max(0.0, self.wall - self.collective - self.data)


class Watch:
    """Times one step of this worker."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.data = 0.0
        self._events: tuple[Any, Any] | None = None
        if self._cuda:
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()
        self._began_at = time.perf_counter()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """The body waits for data."""
        began_at = time.perf_counter()
        yield
        self.data += time.perf_counter() - began_at

    def seconds(self) -> float:
        """Since the step began. On an accelerator what its stream took, or the host where that was longer."""
        if self._events is not None:
            self._events[1].record()
            self._events[1].synchronize()
            host = time.perf_counter() - self._began_at
            return max(host, float(self._events[0].elapsed_time(self._events[1])) / 1000)
        return time.perf_counter() - self._began_at


@dataclass(frozen=True, slots=True)
class Slow:
    """The worker that the others wait for, and why."""

    rank: int
    cause: Cause
    share: float
    """Part of its speed that it has lost, or part of its time that data take."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the status."""
        return {"rank": self.rank, "cause": self.cause, "share": self.share}


@dataclass(frozen=True, slots=True)
class Pace:
    """What a worker took before the first step: so much for a micro-batch, and so much for each of its tokens.

    A worker with few tokens would else look slow because of what every micro-batch costs, get fewer still, and never
    get out of that.
    """

    seconds_per_token: float
    micro_batch_seconds: float = 0.0


@dataclass(slots=True)
class _Averages:
    pace: Pace
    seconds_per_token: float = math.nan
    data_per_token: float = 0.0
    collective: float = 0.0
    wall: float = 0.0
    best: float = math.nan
    """Least seconds a token: what it has shown that it can."""


class Meter:
    """Averages over the last steps, for each rank, the same on all ranks."""

    def __init__(self, paces: Sequence[Pace], trusted: bool = True) -> None:
        """paces: by rank. trusted: False when they were not measured, but only said."""
        self._ranks = [_Averages(pace) for pace in paces]
        if trusted:
            for rank in self._ranks:
                rank.best = rank.pace.seconds_per_token
        self._steps = 0
        self._scale = math.nan
        """What a token took in the first steps against what it took before them, at the least on any rank."""

        self._slow_link: int | None = None
        self._looked_at = 0

    def take(self, times: Sequence[Times]) -> None:
        """What all workers measured in a step, by rank."""
        self._steps += 1
        if self._steps <= SETTLES_AFTER:
            return
        for rank, now in zip(self._ranks, times, strict=True):
            first = self._steps == SETTLES_AFTER + 1
            rank.collective = _moved(rank.collective, now.collective, first)
            rank.wall = _moved(rank.wall, now.wall + now.optimizer, first)
            if now.tokens:
                fresh = math.isnan(rank.seconds_per_token)
                data = now.data / now.tokens
                rank.seconds_per_token = _moved(rank.seconds_per_token, _per_token(rank.pace, now) + data, fresh)
                rank.data_per_token = _moved(rank.data_per_token, data, fresh)
            elif rank.seconds_per_token > rank.best:
                # Without samples it cannot show that it has recovered; it slowly gets the benefit of the doubt.
                rank.seconds_per_token = max(rank.best, rank.seconds_per_token * FORGIVES)
        self._settle()

    def _settle(self) -> None:
        """The first look was at a shorter run of the model than a step is; by how much, the fastest ranks say."""
        ratios = [r.seconds_per_token / r.best for r in self._ranks if r.seconds_per_token / r.best > 0]
        if math.isnan(self._scale) and ratios:
            self._scale = min(ratios)
            for rank in self._ranks:
                rank.best *= self._scale
        for rank in self._ranks:
            rank.best = _least(rank.best, rank.seconds_per_token)

    @property
    def seconds_per_token(self) -> list[float]:
        """Own seconds of a token, by rank; nan for a rank that has not computed any."""
        return [rank.seconds_per_token for rank in self._ranks]

    @property
    def step_seconds(self) -> float:
        """Wall seconds of a step, as the slowest worker sees it; nan before there is one."""
        return max(rank.wall for rank in self._ranks) or math.nan

    @property
    def exchange_seconds(self) -> float:
        """Seconds of a step in which even the busiest worker stands still; what is waited for is not in it."""
        return min(rank.collective for rank in self._ranks)

    def idle_shares(self) -> list[float]:
        """Part of its time that each rank stands still."""
        return [rank.collective / rank.wall if rank.wall else 0.0 for rank in self._ranks]

    def wants_a_look_at_the_network(self) -> bool:
        """Whether the time is right, and reason enough, to time the links between the workers."""
        due = self._steps - self._looked_at >= ASK_EVERY
        return len(self._ranks) > 1 and due and self.exchange_seconds > OF_NETWORK * self.step_seconds

    def take_links(self, seconds: Sequence[float]) -> None:
        """Seconds of the same message from and to each rank."""
        self._looked_at = self._steps
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = sorted(value for rank, value in enumerate(seconds) if rank != slowest)
        self._slow_link = slowest if others and seconds[slowest] > SLOW * others[len(others) // 2] else None

    def slow(self) -> Slow | None:
        """The worker that is slow now, and why; None when none stands out."""
        known = [n for n, rank in enumerate(self._ranks) if rank.seconds_per_token / rank.best > 0]
        if len(known) > 1:
            grown = {number: self._ranks[number].seconds_per_token / self._ranks[number].best for number in known}
            slowest = max(known, key=grown.__getitem__)
            more = grown[slowest] / min(grown.values())
            rank = self._ranks[slowest]
            of_data = rank.data_per_token / rank.seconds_per_token
            if of_data > (OF_DATA if more > SLOW else MOST_DATA):
                return Slow(slowest, "data", of_data)
            if more > SLOW:
                return Slow(slowest, "compute", 1 - 1 / more)
        if self._slow_link is not None and self.exchange_seconds > OF_NETWORK * self.step_seconds:
            return Slow(self._slow_link, "network", self.exchange_seconds / self.step_seconds)
        return None


def _per_token(pace: Pace, now: Times) -> float:
    """Seconds of a token, without what every micro-batch costs: that grows as the whole does."""
    expected = pace.micro_batch_seconds * now.micro_batches + pace.seconds_per_token * now.tokens
    return pace.seconds_per_token * now.computing / expected


def _moved(before: float, now: float, first: bool) -> float:
    return now if first else NEWEST * now + (1 - NEWEST) * before


def _least(one: float, other: float) -> float:
    known = [value for value in (one, other) if not math.isnan(value)]
    return min(known, default=math.nan)
