"""From asked for to accepted: all that `fastserve up` finds out before anything starts, beside the beat.

Reading rows and digests may take long, and who reads a large data set must not hold up the others. What is under way
is kept in memory alone: losing it costs one survey.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastserve.cluster.kube_home import KubeHome, asking
from fastserve.cluster.survey import Survey, survey
from fastserve.errors import UsageInvalid
from fastserve.spec.load import read
from fastserve.spec.model import HardwareProfile, Model
from fastserve_operator.conditions import Trouble, attempted

REFUSED_SECONDS = 15.0
"""A refused Model is surveyed again after so long: its data may have come, with no change of the object."""

AT_ONCE = 2
"""Surveys at the same time."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A survey that was asked for."""

    asked: Mapping[str, Any]
    future: Future[Survey | Trouble]
    at: float


class Surveys:
    """The surveys of one namespace's Models."""

    def __init__(self, home: KubeHome, clock: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self._clock = clock
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="survey")
        self._questions: dict[str, _Question] = {}

    def answer(
        self, found: Mapping[str, Any], profiles: Sequence[HardwareProfile], there: Collection[str]
    ) -> Survey | Trouble | None:
        """What is known of a Model object as it is now: a survey, why there is none, or None while it is read.

        profiles: that are described. there: names of those that the Ray cluster has machines of.
        """
        name = found["metadata"]["name"]
        question = self._questions.get(name)
        if question is None or question.asked != asking(found) or self._is_stale(question):
            future = self._pool.submit(attempted, lambda: self._survey(found, profiles, there))
            self._questions[name] = _Question(asking(found), future, self._clock())
            # A refusal stays in force while the same thing is looked at again.
            again = question is not None and question.asked == asking(found)
            return question.future.result() if question is not None and again else None
        return question.future.result() if question.future.done() else None

    def forget(self, name: str) -> None:
        """A Model that was accepted, or is gone."""
        self._questions.pop(name, None)

    def _is_stale(self, question: _Question) -> bool:
        old = self._clock() > question.at + REFUSED_SECONDS
        return old and question.future.done() and isinstance(question.future.result(), Trouble)

    def _survey(self, found: Mapping[str, Any], profiles: Sequence[HardwareProfile], there: Collection[str]) -> Survey:
        (manifest,) = read(json.dumps(found))
        if not isinstance(manifest, Model):
            raise UsageInvalid(f"{manifest.kind} is no Model")
        return survey(self._home, self._home.store_uri, manifest, profiles, cluster=there)
