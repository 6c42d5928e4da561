"""Which replica a request goes to: revisions by weight, then the target with the least to do.

The router only knows names and numbers; it opens no connection. Counts of running requests outlive a new config, so
that a reload does not make a busy target look idle.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from fastserve.gateway.config import Revision, Served


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to send a request."""

    revision: str
    """Digest of the revision."""

    target: str
    """Base URL."""


class Router:
    """Chooses targets and counts what runs on them."""

    def __init__(self, models: Mapping[str, Served], random: Random) -> None:
        self.models = models
        self._random = random
        self._running: Counter[str] = Counter()

    def choose(self, model: str, tried: Collection[str] = ()) -> Choice | None:
        """A target for a request to `model`; None when nothing takes its traffic.

        tried: targets that have failed this request already. Untried ones come first, of any revision with weight; when
        there is none, a tried one is taken again, for behind one URL stand many replicas.
        """
        served = self.models.get(model)
        ready = (
            [revision for revision in served.revisions if revision.weight > 0 and revision.targets] if served else []
        )
        fresh = [revision for revision in ready if not set(revision.targets) <= set(tried)]
        pool = fresh or ready
        if not pool:
            return None
        revision = self._by_weight(pool)
        targets = [target for target in revision.targets if target not in tried] or list(revision.targets)
        least = min(self._running[target] for target in targets)
        return Choice(revision.digest, self._random.choice([t for t in targets if self._running[t] == least]))

    @contextlib.contextmanager
    def lease(self, target: str) -> Iterator[None]:
        """Count one request as running on `target` for as long as the block lasts."""
        self._running[target] += 1
        try:
            yield
        finally:
            self._running[target] -= 1
            if not self._running[target]:
                del self._running[target]

    def running(self, target: str) -> int:
        """Requests that run on `target` now."""
        return self._running[target]

    def _by_weight(self, pool: list[Revision]) -> Revision:
        if len(pool) == 1:
            return pool[0]
        return self._random.choices(pool, weights=[revision.weight for revision in pool])[0]
