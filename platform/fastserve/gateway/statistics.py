"""What the gateway knows about how its models do: by model and revision, since a moment.

Whoever rolls out a revision compares it with another by these figures, and whoever scales sees who waits. So every try
that reached a replica counts, also when another replica saved the request: otherwise the retry would hide that a
revision fails. There is no prompt, no answer and no client's word in here; names are those of the config.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fastserve.gateway.config import Served
from fastserve.gateway.tally import KEPT_SECONDS, Tally, Times, Track

MOST_REVISIONS = 64
"""Revisions of one model that are remembered."""


class Run:
    """One try of a request on a replica."""

    __slots__ = ("_began", "_first", "_statistics", "_track")

    def __init__(self, statistics: Statistics, track: Track) -> None:
        self._statistics = statistics
        self._track = track
        self._began = time.perf_counter()
        self._first: float | None = None
        track.running += 1

    def first(self) -> None:
        """Note that the first event is there."""
        self._first = time.perf_counter()
        ms = (self._first - self._began) * 1000
        for tally in self._statistics.now(self._track):
            tally.first.add(ms)

    def end(self, *, tokens: int = 0, counts: bool = True, error: bool = False, lost: bool = False) -> None:
        """Note how it ended.

        tokens: tokens that the replica made.
        counts: False when no replica took it.
        error: it was answered with a 5xx, or lost.
        lost: a stream was cut after its first event.
        """
        self._track.running -= 1
        if not counts:
            return
        seconds = 0.0 if self._first is None else time.perf_counter() - self._first
        for tally in self._statistics.now(self._track):
            tally.requests += 1
            tally.errors += error
            tally.lost += lost
            tally.tokens += tokens
            if tokens > 1 and seconds > 0:
                tally.each.add(seconds * 1000 / (tokens - 1))


class Statistics:
    """All counts of one gateway process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.started = clock()
        self._models: dict[str, Track] = {}
        self._revisions: dict[str, dict[str, Track]] = {}

    def run(self, model: str, digest: str) -> Run:
        """Begin a try; `Run.end` must follow."""
        revisions = self._revisions.setdefault(model, {})
        track = revisions.pop(digest, None) or Track()
        revisions[digest] = track  # the one used last stands last
        if len(revisions) > MOST_REVISIONS:
            del revisions[next(iter(revisions))]
        return Run(self, track)

    def late(self, model: str, digest: str) -> None:
        """Count an answer that was not complete in time; the try itself is counted already."""
        track = self._revisions.get(model, {}).get(digest)
        for tally in self.now(track) if track else ():
            tally.errors += 1

    def held(self, model: str, seconds: float) -> None:
        """Count the wait of a request in the hold."""
        for tally in self.now(self._model(model)):
            tally.held.add(seconds * 1000)

    def refused(self, model: str) -> None:
        """Count a request that the hold sent away."""
        for tally in self.now(self._model(model)):
            tally.refused += 1

    def lost(self, model: str) -> None:
        """Count a request that had no whole answer because replicas were lost."""
        for tally in self.now(self._model(model)):
            tally.lost += 1

    def now(self, track: Track) -> tuple[Tally, Tally]:
        """Where to count on `track`."""
        return track.at(int(self._clock()))

    def replace(self, models: Mapping[str, Served]) -> None:
        """Forget what is not in the config any more and cannot be asked for."""
        second = int(self._clock())
        for model, revisions in list(self._revisions.items()):
            served = models.get(model)
            wanted = {revision.digest for revision in served.revisions} if served else set()
            for digest, track in list(revisions.items()):
                if digest not in wanted and track.is_over(second):
                    del revisions[digest]
            if not revisions and served is None:
                self._models.pop(model, None)
                del self._revisions[model]

    def to_json(
        self, since: float, models: Mapping[str, Served], waiting: Callable[[str], int], steps: bool = False
    ) -> dict[str, Any]:
        """All figures since the Unix second `since`; times in milliseconds.

        models: those of the config; each stands in the answer.
        waiting: requests to a model that wait in the hold now.
        steps: tell what percentiles are made of, too, so that figures of several gateways can be put together.
        """
        now = self._clock()
        since = max(since, self.started, now - KEPT_SECONDS)
        names = sorted({*models, *self._models, *self._revisions})
        return {
            "at": now,
            "started": self.started,
            "since": since,
            "models": {
                name: self._model_json(name, int(since), waiting(name), models.get(name), steps) for name in names
            },
        }

    def _model_json(self, name: str, second: int, held: int, served: Served | None, steps: bool) -> dict[str, Any]:
        whole = self._models.get(name, Track()).since(second)
        tracks = self._revisions.get(name, {})
        digests = {**{revision.digest: None for revision in (served.revisions if served else ())}, **tracks}
        return {
            "held": held,
            "running": sum(track.running for track in tracks.values()),
            "refused": whole.refused,
            "lost": whole.lost,
            "heldMs": times_json(whole.held, steps),
            "revisions": {digest: _revision_json(tracks.get(digest) or Track(), second, steps) for digest in digests},
        }

    def _model(self, name: str) -> Track:
        return self._models.setdefault(name, Track())

    def tracks(self) -> tuple[Mapping[str, Track], Mapping[str, Mapping[str, Track]]]:
        """By model, and by model and revision."""
        return self._models, self._revisions


def times_json(times: Times, steps: bool) -> dict[str, Any]:
    """Percentiles of times; and with `steps` all that they are made of."""
    return times.to_json() | (times.steps_json() if steps else {})


def speed_json(each: Times, steps: bool) -> dict[str, Any]:
    """Speeds from times a token; and with `steps` all that they are made of."""
    return _speed(each) | (each.steps_json() if steps else {})


def _speed(each: Times) -> dict[str, Any]:
    """Median, the speed that 95 % of the streams reach, the mean (all time over all tokens), and how many there were.

    A plain mean of speeds would be that of the few answers whose tokens came in one piece."""
    count, middle, slow = each.count, each.percentile(0.5), each.percentile(0.95)
    mean_ms = each.sum_ms / count if count else 0.0
    return {
        "mean": round(1000 / mean_ms, 3) if mean_ms else None,
        "p50": round(1000 / middle, 3) if middle else None,
        "p5": round(1000 / slow, 3) if slow else None,
        "count": count,
    }


def _revision_json(track: Track, second: int, steps: bool) -> dict[str, Any]:
    whole = track.since(second)
    return {
        "requests": whole.requests,
        "errors": whole.errors,
        "lost": whole.lost,
        "running": track.running,
        "ttftMs": times_json(whole.first, steps),
        "tokensPerSecond": speed_json(whole.each, steps),
        "tokens": whole.tokens,
    }
