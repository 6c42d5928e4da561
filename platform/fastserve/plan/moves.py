"""The moves: what may be done next, as plain values. Carrying out a move twice equals once.

A list of moves is carried out in its order. `Wait`, `Done` and `Refuse` ask for nothing; the last two stand only
where nothing else is left to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastserve.plan.observed import Pin
from fastserve.plan.revision import Revision
from fastserve.plan.stages import StageRequest
from fastserve.spec.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Something to do, and why; the same words stand in status, `fastserve why`, the log and the tests."""

    because: str
    """A full sentence in the manifest's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolve(Move):
    """Find out the digest of an outside source."""

    uri: str
    """The source's name as `plan.keys.outside` gives it, with @revision where one is given."""

    role: str
    """`model`, `data` or `adapter`."""

    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStage(Move):
    """Start one attempt of a stage."""

    request: StageRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAttempt(Move):
    """End a running attempt whose result nobody wants any more."""

    key: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRevision(Move):
    """Bring a revision up beside what serves now."""

    revision: Revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift(Move):
    """Route traffic by these weights."""

    weights: Mapping[str, int]
    """Percent of traffic by revision digest; a revision left out gets none. Empty: nothing is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRevision(Move):
    """Drain a revision that no longer gets traffic, and take it away."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RollBack(Move):
    """Remember that a revision was worse than the one it was to replace, so that it is not tried again."""

    pin: Pin


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpin(Move):
    """Forget a rollback: the manifest no longer asks for what was rolled back from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait(Move):
    """Nothing to do but wait for something that is under way."""

    stage: str
    """What is waited for: source, train, compress, evaluate or serve."""

    until: float | None = None
    """Unix seconds at which the next try is due; None while something runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Move):
    """What is wanted is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse(Move):
    """A named end: nothing more will be done until the manifest or the world changes."""

    reason: str
    """Machine-readable word: GateFailed, StageFailed, EngineFailed, RolledBack, ..."""

    stage: str
    """What is refused: source, train, compress, evaluate or serve."""
