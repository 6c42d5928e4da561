"""The stage's process asks its workers to stop after their step, so that the run can go on with more or fewer of them.

What is asked for lies beside the attempt, like the workers' news, and reaches over machines wherever the artifacts do.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastserve.artifacts.attempts import attempt_folder
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, StoreFailed
from fastserve.plan.stages import StageRequest

PAUSED = "Paused"
"""Reason with which workers end that stopped because they were asked to."""

EVERY_SECONDS = 1.0

_LOG = logging.getLogger(__name__)


def ask(store: Store, request: StageRequest, part: int) -> None:
    """Ask the workers of this part of the run to stop. Raises StoreFailed."""
    store.write(_name(request), json.dumps({"part": part}).encode())


@contextmanager
def watched(store: Store, request: StageRequest, part: int, first: bool) -> Iterator[Callable[[], bool]]:
    """A function that says whether this part's workers are asked to stop; it takes no time, and only the first worker
    looks."""
    if not first:
        yield lambda: False
        return
    asked, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_SECONDS) and not asked.is_set():
            if _part(store, request) == part:
                asked.set()

    thread = threading.Thread(target=look, name="training-pause", daemon=True)
    thread.start()
    try:
        yield asked.is_set
    finally:
        ended.set()
        thread.join()


def _part(store: Store, request: StageRequest) -> int | None:
    try:
        return int(json.loads(store.read(_name(request)))["part"])
    except ArtifactNotFound:
        return None
    except (StoreFailed, ValueError, KeyError, TypeError) as error:
        _LOG.warning("whether to pause was not read: %s", error)
        return None


def _name(request: StageRequest) -> str:
    return attempt_folder(request.stage, request.key, request.attempt) + "pause.json"
