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
class Place:
    """A revision on the machines of one hardware profile."""

    profile: str
    state: RevisionState
    replicas: int
    """Replicas that answer."""

    wanted: int
    """Replicas that there should be; 0 where nobody asks and `replicas.min` is 0."""

    message: str = ""


@dataclass(frozen=True, slots=True)
class LiveRevision:
    """A revision that the serving cluster knows of."""

    digest: str
    state: RevisionState
    """Ready when any of its places answers."""

    message: str = ""
    replicas: int = 0
    """Replicas that answer, over all places."""

    places: tuple[Place, ...] = ()
    """By profile, in the order of `serve.profiles`."""

    since: float | None = None
    """Unix seconds at which it was asked to start; None when that is not known."""


@dataclass(frozen=True, slots=True)
class Window:
    """What the gateway saw of one revision since the traffic was last shared out anew."""

    seconds: float
    """How long it watched: less than since the shift, when the gateway was started again in between."""

    requests: int = 0
    """Requests that ended, well or badly."""

    errors: int = 0
    """Answers of 500 and above, and streams that broke off. What a client did wrong is none."""

    ttft_ms: float | None = None
    """Median time to the first token."""

    ttft_p95_ms: float | None = None
    first_tokens: int = 0
    """Answers that the two times are of."""

    tokens_per_s: float | None = None
    """Median over answers of each one's speed."""

    slow_tokens_per_s: float | None = None
    """The speed that 95 % of the answers reach."""

    rates: int = 0
    """Answers that the speed is of."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A rollback: serve `revision` as long as the manifest still asks for `instead_of`."""

    revision: str
    instead_of: str
    reason: str = ""
    """Empty when somebody asked for it; RolledBack when the rollout did it by itself."""

    because: str = ""
    """What was found, in a sentence with its figures; empty when somebody asked for it."""


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

    shifted_at: float | None = None
    """Unix seconds at which the weights became what they are; None when that is not known."""

    proven: str | None = None
    """Digest of the last revision that had all the traffic."""

    windows: Mapping[str, Window] = field(default_factory=dict)
    """What the gateway saw since `shifted_at`, by digest; empty while it does not tell."""

    cluster_since: float | None = None
    """Unix seconds at which the serving cluster started; None when that is not known."""

    pin: Pin | None = None
    known_revisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each revision of this model serves, by digest: the value of `Revision.to_json`, and `proven` where it has
    had all the traffic. Rollback may go to any of them."""
