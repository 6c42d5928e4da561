"""Which replica a request goes to: a revision by weight, then a target by free capacity.

A target says how many requests it may have at once (slots). A request never goes where there is no free slot; who
finds none waits in the hold. Hardware of lower rank is preferred while it has free slots; targets of equal rank are
taken in proportion to their free slots, so a slow one fills up less often than a fast one. A target that is marked
`last` is for requests that another has failed. The router only knows
names and numbers; it opens no connection. Counts of running requests outlive a new config, so that a reload does not
make a busy target look idle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from fastserve.gateway.config import Revision, Served, Target

REST_SECONDS = 1.0
"""A target that did not take a request is left out for so long where there is another: idle as it looks, it would get
most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to send a request; it holds a slot there until it is given back."""

    revision: str
    """Digest of the revision."""

    target: str
    """Base URL."""

    last: bool = False
    """Whether it is a target for what others have failed."""


class Router:
    """Chooses targets and counts what runs on them."""

    def __init__(
        self, models: Mapping[str, Served], random: Random, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.models = models
        self._random = random
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._resting: dict[str, float] = {}

    def draw(self, model: str) -> str | None:
        """Digest of the revision that a new request to `model` goes to, by weight; None when none takes traffic."""
        ready = self._ready(model)
        return self._by_weight(ready).digest if ready else None

    def is_ready(self, model: str, digest: str | None) -> bool:
        """Whether the revision takes traffic."""
        return any(revision.digest == digest for revision in self._ready(model))

    def take(self, model: str, digest: str) -> Choice | None:
        """A slot of one revision; None when it has none that is free."""
        for revision in self._ready(model):
            if revision.digest == digest:
                targets = [target for target in revision.targets if not target.last] or list(revision.targets)
                return self._taken(revision, self._free(self._awake(targets) or targets))
        return None

    def take_any(self, model: str, tried: Collection[str] = ()) -> Choice | None:
        """A slot of any revision that takes traffic; None when none is free.

        tried: targets that have failed this request already. Untried ones come first; when none of those is free, a
        tried one is taken again, for behind one URL stand many replicas.
        """
        ready = self._ready(model)
        awake = any(self._awake(revision.targets) for revision in ready)
        free = {
            revision.digest: self._free(self._awake(revision.targets) if awake else revision.targets)
            for revision in ready
        }
        fresh = {digest: [target for target in found if target.url not in tried] for digest, found in free.items()}
        for targets in (fresh, free):
            pool = [revision for revision in ready if targets[revision.digest]]
            if pool:
                revision = self._by_weight(pool)
                return self._taken(revision, targets[revision.digest])
        return None

    def give_back(self, choice: Choice) -> None:
        """End what `take` or `take_any` began."""
        self._running[choice.target] -= 1
        if not self._running[choice.target]:
            del self._running[choice.target]

    def rest(self, target: str) -> None:
        """Leave `target` out for a moment where there is another: it took nothing."""
        now = self._clock()
        self._resting = {url: until for url, until in self._resting.items() if until > now}
        self._resting[target] = now + REST_SECONDS

    def running(self, target: str) -> int:
        """Requests that run on `target` now."""
        return self._running[target]

    def _ready(self, model: str) -> list[Revision]:
        served = self.models.get(model)
        return [revision for revision in served.revisions if revision.weight > 0 and revision.targets] if served else []

    def _awake(self, targets: Iterable[Target]) -> list[Target]:
        now = self._clock()
        return [target for target in targets if self._resting.get(target.url, now) <= now]

    def _free(self, targets: Iterable[Target]) -> list[Target]:
        return [target for target in targets if not target.slots or self._running[target.url] < target.slots]

    def _taken(self, revision: Revision, free: list[Target]) -> Choice | None:
        if not free:
            return None
        target = free[0] if len(free) == 1 else self._best(free)
        self._running[target.url] += 1
        return Choice(revision.digest, target.url, target.last)

    def _best(self, free: list[Target]) -> Target:
        best = min((target.last, target.rank) for target in free)
        equal = [target for target in free if (target.last, target.rank) == best]
        known = [target.slots for target in equal if target.slots]
        if not known:
            least = min(self._running[target.url] for target in equal)
            return self._random.choice([target for target in equal if self._running[target.url] == least])
        # Slots that nobody knows count as the mean of the others; such a target is never full.
        usual = sum(known) / len(known)
        room = [max(1.0, (target.slots or usual) - self._running[target.url]) for target in equal]
        return self._random.choices(equal, weights=room)[0]

    def _by_weight(self, pool: list[Revision]) -> Revision:
        if len(pool) == 1:
            return pool[0]
        return self._random.choices(pool, weights=[revision.weight for revision in pool])[0]
