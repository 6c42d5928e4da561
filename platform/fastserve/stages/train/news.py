"""How far the workers are, told to the stage's process through the store.

The stage's process alone writes the attempt's progress, and repeats it as its heartbeat; it sits in Ray Train's `fit`
while the first worker knows the steps. So that worker leaves its news beside the attempt, and a thread here takes them
up. A small object needs no process of its own, and reaches over machines wherever the artifacts do.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastserve.artifacts.attempts import attempt_folder
from fastserve.artifacts.store import Store
from fastserve.errors import ArtifactNotFound, StoreFailed
from fastserve.plan.stages import StageRequest
from fastserve.stages.work import Work
from fastserve.telemetry import curve
from fastserve.telemetry.progress import Progress

EVERY_SECONDS = 0.5
SAY_SECONDS = 5.0
"""Between two losses in the stage's log."""

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


class Said:
    """Which of the losses go into the log: the first, the last, one every few seconds, and each one that is measured
    on validation rows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds that never go back."""
        self._clock = clock
        self._at = -SAY_SECONDS
        self._step = -1
        self._validation: float | None = None

    def of(self, news: Progress, over: bool) -> str | None:
        """What is to be said of the news; None when nothing is. over: there will be no more."""
        loss, validation = news.metrics.get("loss"), news.metrics.get("validationLoss")
        measured = validation is not None and validation != self._validation
        due = over or measured or self._clock() >= self._at + SAY_SECONDS
        if loss is None or not due or int(news.done) == self._step:
            return None
        self._at, self._step, self._validation = self._clock(), int(news.done), validation
        row = {"step": self._step, "loss": loss, **({"validationLoss": validation} if measured else {})}
        return curve.told(row, int(news.total))


def _follow(work: Work, remark: Callable[[], str], ended: threading.Event) -> None:
    last, noted, said = 0.0, "", Said()
    while True:
        over = ended.wait(EVERY_SECONDS)
        news = _read(work.store, work.request)
        note = remark()
        if news is not None and (news.at > last or note != noted):
            last, noted = news.at, note
            work.report.update(news.done, news.total, news.unit, note or news.note, **{**news.metrics, "size": note})
        sentence = said.of(news, over) if news is not None else None
        if sentence is not None:
            _LOG.info(sentence)
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
