"""A frozen snapshot of all that a decision may depend on: what is there, never what was remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fastserve.plan.stages import Stage


@dataclass(frozen=True, slots=True)
class Committed:
    """What is known of a committed artifact: its record in short."""

    stage: Stage
    key: str
    digest: str
    """sha256 over the files' paths and digests."""

    size_bytes: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


class AttemptState(StrEnum):
    """How an attempt stands that has not committed."""

    RUNNING = "running"
    FAILED = "failed"
    """It ended and said why."""

    LOST = "lost"
    """It ended without a word: killed, or the cluster died under it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The newest attempt at a key."""

    number: int
    state: AttemptState
    reason: str = ""
    """Machine-readable word when it failed: DatasetInvalid, OutOfMemory, StageFailed, ..."""

    message: str = ""
    final: bool = False
    """True: trying again cannot help, since the input itself is refused."""

    ended_at: float | None = None
    """Unix seconds at which it failed or was found lost; None while it runs."""

    model: str = ""
    """Name of the Model that asked for it: two Models with one source share its key."""


class RevisionState(StrEnum):
    """How a revision stands in the serving cluster."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class LiveRevision:
    """A revision that the serving cluster knows of."""

    digest: str
    state: RevisionState
    message: str = ""
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class Pin:
    """A rollback: serve `revision` as long as the manifest still asks for `instead_of`."""

    revision: str
    instead_of: str


@dataclass(frozen=True, slots=True)
class Observed:
    """The world as far as one Model is concerned."""

    digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of each outside source by URI (with @revision), where it has been resolved."""

    committed: Mapping[str, Committed] = field(default_factory=dict)
    """Committed artifacts by key."""

    attempts: Mapping[str, Attempt] = field(default_factory=dict)
    """Newest attempt by key, for keys that are not committed; also for keys that are no longer wanted, where one
    still runs."""

    forgiven: Mapping[str, int] = field(default_factory=dict)
    """By key, the newest attempt there was when the user last asked for this Model: asking again is trying again, so
    failures up to this number do not count."""

    revisions: tuple[LiveRevision, ...] = ()
    """Revisions that the serving cluster knows of."""

    weights: Mapping[str, int] = field(default_factory=dict)
    """Percent of traffic by revision digest, as the gateway routes it now."""

    pin: Pin | None = None
    known_revisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each revision of this model serves, by digest: the value of `Revision.to_json`. Rollback may go to any of
    them."""
