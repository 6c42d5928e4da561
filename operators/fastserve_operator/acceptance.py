"""From asked for to accepted: all that `fastserve up` finds out before anything starts, beside the beat.

Reading rows and digests may take long, and who reads a large data set, or asks a source that never answers, must not
hold up the others: a survey that is slow moves aside, and the next one begins. What is under way is kept in memory
alone: losing it costs one survey.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastserve.artifacts.tokens import secrets_from
from fastserve.cluster.kube.home import KubeHome, asking
from fastserve.cluster.survey import Survey, survey
from fastserve.errors import UsageInvalid
from fastserve.spec.load import read
from fastserve.spec.model import HardwareProfile, Model
from fastserve_operator.conditions import Trouble, attempted

REFUSED_SECONDS = 15.0
"""A refused Model is surveyed again after so long: its data may have come, with no change of the object."""

AT_ONCE = 2
"""Surveys at the same time, not counting the slow ones."""

SLOW_SECONDS = 20.0
"""A survey that takes longer is slow."""

MOST = 64
"""Surveys at the same time, slow ones included."""

MOST_OF_ONE = 3
"""Of one Model, whose source hangs and which is edited again and again."""


@dataclass(slots=True)
class _Question:
    """A survey that was asked for."""

    name: str
    asked: Mapping[str, Any]
    work: Callable[[], Survey | Trouble]
    at: float
    future: Future[Survey | Trouble] = field(default_factory=Future)
    began_at: float | None = None
    """None while it waits for its turn."""


class Surveys:
    """The surveys of one namespace's Models. To be asked by one thread."""

    def __init__(
        self, home: KubeHome, secret: Callable[[str], Mapping[str, str]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """secret: reads the Secret that a source names."""
        self._home = home
        self._secret = secret
        self._clock = clock
        self._questions: dict[str, _Question] = {}
        self._begun: list[_Question] = []
        self._waiting: dict[str, _Question] = {}
        self._lock = threading.Lock()

    def answer(
        self,
        found: Mapping[str, Any],
        profiles: Sequence[HardwareProfile],
        there: Collection[str],
        patience_seconds: float = 0.0,
    ) -> Survey | Trouble | None:
        """What is known of a Model object as it is now: a survey, why there is none, or None while it is read.

        profiles: that are described. there: names of those that the Ray cluster has machines of. patience_seconds: how
        long a survey that has just begun is waited for; one that waits for its turn is not.
        """
        name = found["metadata"]["name"]
        question = self._questions.get(name)
        if question is None or question.asked != asking(found) or self._is_stale(question):
            self.forget(name)
            work = partial(attempted, lambda: self._survey(found, profiles, there))
            self._questions[name] = _Question(name, asking(found), work, self._clock())
            with self._lock:
                self._waiting[name] = self._questions[name]
            self._begin()
            # A refusal stays in force while the same thing is looked at again.
            again = question is not None and question.asked == asking(found)
            if question is not None and again:
                return question.future.result()
            question = self._questions[name]
            if question.began_at is not None:
                wait([question.future], patience_seconds)
        self._begin()
        if question.future.done():
            return question.future.result()
        return SLOW if self._is_slow(question) else None

    def forget(self, name: str) -> None:
        """A Model that was accepted, or is gone."""
        self._questions.pop(name, None)
        with self._lock:
            self._waiting.pop(name, None)

    def keep(self, names: Collection[str]) -> None:
        """Forget all others."""
        for name in self._questions.keys() - set(names):
            self.forget(name)

    def _begin(self) -> None:
        """Begin those whose turn it is."""
        with self._lock:
            self._begun = [question for question in self._begun if not question.future.done()]
            while (question := self._next()) is not None:
                del self._waiting[question.name]
                self._begun.append(question)
                question.began_at = self._clock()
                # A daemon: a source that never answers keeps no operator from ending.
                threading.Thread(
                    target=self._run, args=(question,), name=f"survey {question.name}", daemon=True
                ).start()

    def _next(self) -> _Question | None:
        """The one whose turn it is; None when nothing waits, or enough are under way."""
        quick = sum(not self._is_slow(other) for other in self._begun)
        if quick >= AT_ONCE or len(self._begun) >= MOST:
            return None
        of_each = Counter(other.name for other in self._begun)
        return next((item for name, item in self._waiting.items() if of_each[name] < MOST_OF_ONE), None)

    def _run(self, question: _Question) -> None:
        question.future.set_result(question.work())
        self._begin()

    def _is_slow(self, question: _Question) -> bool:
        return question.began_at is not None and self._clock() > question.began_at + SLOW_SECONDS

    def _is_stale(self, question: _Question) -> bool:
        old = self._clock() > question.at + REFUSED_SECONDS
        return old and question.future.done() and isinstance(question.future.result(), Trouble)

    def _survey(self, found: Mapping[str, Any], profiles: Sequence[HardwareProfile], there: Collection[str]) -> Survey:
        (manifest,) = read(json.dumps(found))
        if not isinstance(manifest, Model):
            raise UsageInvalid(f"{manifest.kind} is no Model")
        with secrets_from(self._secret):
            return survey(self._home, self._home.store_uri, manifest, profiles, cluster=there)


SLOW = Trouble(
    "Surveying",
    f"Its sources and data are being read for more than {SLOW_SECONDS:.0f} s: they are large, or do not answer.",
    True,
)
