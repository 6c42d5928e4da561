"""How far the workers are, told to the stage's process through the store.

The stage's process alone writes the attempt's progress, and repeats it as its heartbeat; it sits in Ray Train's `fit`
while the first worker knows the steps. So that worker leaves its news beside the attempt, and a thread here takes them
up. A small object needs no process of its own, and reaches over machines wherever the artifacts do.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastserve.artifacts.attempts import attempt_folder
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, StoreFailed
from fastserve.plan.stages import StageRequest
from fastserve.stages.work import Work
from fastserve.telemetry.progress import Progress

EVERY_SECONDS = 0.5

_LOG = logging.getLogger(__name__)


def tell(store: Store, request: StageRequest, progress: Mapping[str, Any]) -> None:
    """Leave the news. A store that cannot take them now does not harm the run."""
    try:
        store.write(_name(request), json.dumps(progress).encode())
    except StoreFailed as error:
        _LOG.warning("progress was not written: %s", error)


def last(store: Store, request: StageRequest) -> Progress | None:
    """The news that were left last at this attempt, by this group of workers or by one before it."""
    return _read(store, request)


@contextmanager
def following(work: Work, remark: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Hand the workers' news on to `work.report` while the body runs.

    remark: what there is to say of the run's size, in place of the workers' note; empty when there is nothing.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(work, remark, ended), name="training-news", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _follow(work: Work, remark: Callable[[], str], ended: threading.Event) -> None:
    last, said = 0.0, ""
    while True:
        over = ended.wait(EVERY_SECONDS)
        news = _read(work.store, work.request)
        note = remark()
        if news is not None and (news.at > last or note != said):
            last, said = news.at, note
            work.report.update(news.done, news.total, news.unit, note or news.note, **{**news.metrics, "size": note})
        if over:
            return


def _read(store: Store, request: StageRequest) -> Progress | None:
    try:
        return Progress.from_json(json.loads(store.read(_name(request))))
    except ArtifactNotFound:
        return None
    except (StoreFailed, ValueError, KeyError) as error:
        _LOG.warning("progress was not read: %s", error)
        return None


def _name(request: StageRequest) -> str:
    return attempt_folder(request.stage, request.key, request.attempt) + "workers.json"
