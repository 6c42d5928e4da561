"""How many workers a run has now: as its manifest lists, less what it lends to serving, less what others have taken.

An elastic run goes through parts: each is one Ray Train run of one size. Another size is asked for by the wish beside
the attempt (`plan.sharing`), or comes with machines that others have let go. Then the workers stop after their step,
their checkpoint is written, and the next part goes on from it; nothing is done twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fastserve.artifacts import attempts
from fastserve.errors import StoreFailed
from fastserve.plan.sharing import Wish, kept_to, room_for
from fastserve.spec.train import Train
from fastserve.stages.train import news, pause
from fastserve.stages.work import Work

LOOK_EVERY_SECONDS = 1.0

GROW_AFTER_SECONDS = 5.0
"""Machines have to be free for so long before a run grows: each growth starts its workers anew."""

_SETTLES_SECONDS = 5.0
"""Ray takes a moment to count machines as free that the part before has left."""

_LOG = logging.getLogger(__name__)

Usable = Callable[[Mapping[str, int]], Mapping[str, int] | None]
"""From workers of this run by profile to the places of each profile that it has or could have."""


@dataclass(frozen=True, slots=True)
class Size:
    """Workers of one part of a run."""

    workers: Mapping[str, int]
    """By profile."""

    listed: Mapping[str, int]
    """What the manifest lists."""

    because: str = ""
    """Why they are fewer."""

    @property
    def count(self) -> int:
        """Workers over all profiles."""
        return sum(self.workers.values())

    @property
    def whole(self) -> bool:
        """Whether these are all that the manifest lists."""
        return dict(self.workers) == dict(self.listed)

    @property
    def note(self) -> str:
        """For whoever watches; empty when there is nothing to say."""
        if self.whole:
            return ""
        return f"training with {self.count} of {sum(self.listed.values())} workers: {self.because}"


def listed(train: Train) -> dict[str, int]:
    """Workers of the manifest by profile."""
    found: Counter[str] = Counter()
    for group in train.workers:
        found[group.profile] += group.count
    return dict(found)


class Sizes:
    """The sizes that one run takes, one after the other."""

    def __init__(self, work: Work, train: Train, usable: Usable) -> None:
        self._work, self._usable = work, usable
        self._least = None if train.elastic is None else train.elastic.min_workers
        self._listed = listed(train)
        self._wish: Wish | None = None
        self.now = Size(self._listed, self._listed)

    def choose(self) -> Size:
        """The size of the part that begins now; none of the run's workers is there."""
        until = time.monotonic() + _SETTLES_SECONDS
        while True:
            wanted = self._wanted()
            found = self._size(wanted, {})
            if found.workers == wanted or self._least is None or time.monotonic() >= until:
                break
            time.sleep(0.5)
        self.now = found
        return found

    @contextmanager
    def watching(self, part: int) -> Iterator[None]:
        """Ask the workers of this part to stop as soon as the run is to have another size, while the body runs."""
        if self._least is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(part, ended), name="training-size", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, part: int, ended: threading.Event) -> None:
        grown: Mapping[str, int] | None = None
        since = time.monotonic()
        while not ended.wait(LOOK_EVERY_SECONDS):
            wanted = self._wanted()
            shrinks = any(wanted[profile] < count for profile, count in self.now.workers.items())
            possible = wanted if shrinks else self._size(wanted, self._held()).workers
            if not shrinks and sum(possible.values()) <= self.now.count:
                grown = None
                continue
            if not shrinks and possible != grown:
                grown, since = possible, time.monotonic()
                continue
            if not shrinks and time.monotonic() - since < GROW_AFTER_SECONDS:
                continue
            try:
                pause.ask(self._work.store, self._work.request, part)
            except StoreFailed as error:
                _LOG.warning("the workers could not be asked to stop: %s", error)
                continue
            _LOG.info("the run goes on with %s workers after this step", dict(possible))
            return

    def _wanted(self) -> Mapping[str, int]:
        """By the wish that stands now; by the last one that was read when the store cannot be."""
        request = self._work.request
        try:
            value = attempts.read_wish(self._work.store, request.stage, request.key, request.attempt)
            self._wish = None if value is None else Wish.from_json(value)
        except (StoreFailed, KeyError, TypeError, ValueError) as error:
            _LOG.warning("what this run is asked for was not read: %s", error)
        return kept_to(self._listed, self._least, self._wish)

    def _size(self, wanted: Mapping[str, int], held: Mapping[str, int]) -> Size:
        workers = room_for(wanted, self._usable(held), self._least)
        because = self._wish.because if self._wish is not None and wanted != self._listed else ""
        if workers != wanted:
            taken = ", ".join(sorted(profile for profile in wanted if workers[profile] < wanted[profile]))
            because = f"other machines of profile {taken} are taken"
        return Size(workers, self._listed, because)

    def _held(self) -> Mapping[str, int]:
        """Workers by profile, as the first of them last told."""
        told = news.last(self._work.store, self._work.request)
        workers = told.metrics.get("workers", []) if told is not None else []
        return Counter(str(worker["profile"]) for worker in workers)
