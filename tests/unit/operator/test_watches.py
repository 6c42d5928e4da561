"""When the operator looks, and what it does about a watch that breaks."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

import pytest

from fastserve.errors import ClusterFailed
from fastserve_operator import __main__ as operator
from fastserve_operator.__main__ import _look, _watch


@dataclass
class ALease:
    """Taken, kept, lost to another replica, and taken again."""

    terms: list[int]
    """Of each time that it is asked for; 0 while another replica has it."""

    term: int = 0

    @property
    def held(self) -> bool:
        self.term = max(self.term, self.terms[0])
        return self.terms.pop(0) > 0


@dataclass
class Deeds:
    """What was done, in order, until the last look."""

    lease: ALease
    stop: threading.Event
    done: list[str] = field(default_factory=list)

    def tend(self) -> bool:
        self.done.append(f"look {self.lease.term}")
        if not self.lease.terms:
            self.stop.set()
        return True

    def anew(self) -> None:
        self.done.append("anew")


def test_the_first_look_of_each_term_believes_nothing_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "CALM_SECONDS", "GATHER_SECONDS"):
        monkeypatch.setattr(operator, name, 0.0)
    stop, wake = threading.Event(), threading.Event()
    lease = ALease([0, 1, 1, 0, 2, 2])
    deeds = Deeds(lease, stop)
    _look(deeds, lease, stop, wake, deeds.anew)  # type: ignore[arg-type]
    assert deeds.done == ["anew", "look 1", "look 1", "anew", "look 2", "look 2"]


@dataclass
class Breaking:
    """A watch that breaks so often, then is heard of once, then breaks again."""

    stop: threading.Event
    ends: list[bool]
    name: str = "models of demo"

    def follow(self, patience_seconds: float) -> None:
        breaks = self.ends.pop(0)
        if not self.ends:
            self.stop.set()
        if breaks:
            raise ClusterFailed("no answer")


def test_a_watch_that_breaks_is_taken_up_again_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(operator, "FIRST_WAIT_SECONDS", 0.001)
    stop = threading.Event()
    watched = Breaking(stop, [True, True, True, False, True, True])
    with caplog.at_level(logging.WARNING, logger="fastserve.operator"):
        _watch(watched, stop)  # type: ignore[arg-type]
    assert watched.ends == []
    said = [record.message for record in caplog.records]
    assert said == ["models of demo are not watched for now, and listed at each look: no answer"] * 2
