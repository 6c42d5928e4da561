"""A watched collection that is read by a thread of its own, as in the operator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fastserve.cluster.kube.watched import Watched
from fastserve.errors import ClusterFailed

END_SECONDS = 120


@contextmanager
def followed(watched: Watched, end_watches: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Read while the block lasts. end_watches: cuts a watch that would go on for long; a real server ends its own."""
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            with suppress(ClusterFailed):
                watched.follow(patience_seconds=0.05)
            over.wait(0.02)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        end = time.monotonic() + END_SECONDS
        while thread.is_alive() and time.monotonic() < end:
            end_watches()
            thread.join(0.05)
