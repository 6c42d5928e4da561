"""What the heads of a namespace were seen to have, one by one: jobs, applications, and which of them do not answer.

It is kept in memory from one look to the next, so that a head that is silent for a while is not taken for an empty one.
Losing it costs one look, and at most one more wait.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fastserve.cluster.kube.heads import NamedHead
from fastserve.cluster.live import app_state
from fastserve.cluster.parts import Endpoint
from fastserve.cluster.ray_jobs import Job, Jobs, JobState
from fastserve.cluster.ray_serve import AppStatus, ServeApi, revision_name
from fastserve.errors import FastServeError
from fastserve.plan import moving
from fastserve.plan.moving import Route, Standing, Stay
from fastserve.plan.observed import RevisionState
from fastserve.plan.revision import Revision


@dataclass(frozen=True, slots=True)
class Sight:
    """One head, as it was seen last."""

    endpoint: Endpoint | None
    """None: it is not there."""

    apps: Mapping[str, AppStatus]
    jobs: Mapping[str, Job]
    of_revision: Mapping[str, Sequence[AppStatus]]
    """The applications again, by the names of the revisions that they may be of."""


class Sights:
    """All heads of one namespace."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds that never go back."""
        self._clock = clock
        self.looked = False
        """Whether anything was looked at yet."""

        self._seen: dict[str, Sight] = {}
        self._jobs: dict[str, Job] = {}
        self._routable: dict[str, Mapping[str, AppStatus]] = {}
        self._troubles: dict[str, FastServeError] = {}
        self._silent_since: dict[str, float] = {}
        self._routed: dict[str, tuple[str, float]] = {}
        """To which head requests for a revision go, and since when, by the revision's name."""

    def look(self, heads: Sequence[NamedHead]) -> None:
        """See what every head has. One that does not answer is what it was before, and its trouble is kept."""
        self.looked = True
        names = {named.name for named in heads}
        for known in (self._seen, self._routable, self._silent_since):
            for name in known.keys() - names:
                del known[name]
        self._troubles = {}
        for named in heads:
            try:
                self._seen[named.name] = _sight(named)
                self._silent_since.pop(named.name, None)
                self._routable.pop(named.name, None)  # what could be gone to before says nothing of what is there now
            except FastServeError as error:
                self.note(named.name, error)
        self._jobs = {name: job for sight in self._seen.values() for name, job in sight.jobs.items()}

    def note(self, name: str, error: FastServeError) -> None:
        """Something could not be done at a head."""
        self._troubles[name] = error
        self._silent_since.setdefault(name, self._clock())

    def trouble(self, name: str) -> FastServeError | None:
        """Why a head could not be seen, or told something, at this look."""
        return self._troubles.get(name)

    def is_unknown(self, name: str) -> bool:
        """Whether a head is there that was never seen."""
        return name in self._troubles and name not in self._seen

    def silent_seconds(self, name: str) -> float:
        """For how long a head has not answered; 0 when it does."""
        since = self._silent_since.get(name)
        return 0.0 if since is None else self._clock() - since

    def is_idle(self, name: str) -> bool:
        """Whether a head answers, and has neither an application nor a job that runs."""
        sight = self._seen.get(name)
        if sight is None or name in self._troubles:
            return False
        return not sight.apps and all(
            job.state not in (JobState.PENDING, JobState.RUNNING) for job in sight.jobs.values()
        )

    def jobs(self) -> Mapping[str, Job]:
        """The jobs of all heads; no two have one of the same name, since an attempt's number is never given twice.
        Until the next look it is the same value, and has what was begun since."""
        return self._jobs

    def without(self, heads: Collection[str]) -> tuple[dict[str, Job], dict[str, AppStatus]]:
        """The jobs and the applications of all heads but these."""
        seen = [sight for head, sight in self._seen.items() if head not in heads]
        jobs = {name: job for sight in seen for name, job in sight.jobs.items()}
        return jobs, {name: app for sight in seen for name, app in sight.apps.items()}

    def begun(self, head: str, job: Job) -> None:
        """A job was submitted to a head: whoever is looked at next must not take it for lost."""
        self._jobs[job.submission_id] = job
        sight = self._seen.get(head)
        if sight is not None:
            self._seen[head] = replace(sight, jobs={**sight.jobs, job.submission_id: job})

    def apps(self, routed: Mapping[str, str]) -> Mapping[str, AppStatus]:
        """The applications of all heads. routed: the head whose word counts, by the revision's name."""
        found: dict[str, AppStatus] = {}
        for head, sight in self._seen.items():
            for name, app in sight.apps.items():
                if name not in found or any(routed.get(revision) == head for revision in _revisions(name)):
                    found[name] = app
        return found

    @property
    def serves(self) -> bool:
        """Whether any head has an application."""
        return any(sight.apps for sight in self._seen.values())

    def answers(self, head: str, revision: Revision) -> bool:
        """Whether a revision answers at a head."""
        return self._standing(head, revision).answers

    def routed(self, revision: Revision) -> str | None:
        """The head that a revision's requests go to; None when nobody knows."""
        return self._routed.get(revision_name(revision.model, revision.digest), (None, 0.0))[0]

    def stay(self, name: str, revision: Revision, wanted: str) -> Stay:
        """Where a revision shall be. name: its name among those that must be up. wanted: the head it shall have."""
        standing = {head: self._standing(head, revision) for head in self._seen}
        before, now = self._routed.get(name), self._clock()
        found = moving.stay(wanted, standing, None if before is None else Route(before[0], now - before[1]))
        if before is None or before[0] != found.routed:
            self._routed[name] = (found.routed, now)
        return found

    def dashboards(self) -> set[str]:
        """Addresses of the heads that were seen."""
        return {sight.endpoint.dashboard_url for sight in self._seen.values() if sight.endpoint is not None}

    def keep_only(self, revisions: Collection[str]) -> None:
        """Forget where requests for every other revision went. revisions: names of those that shall be up."""
        for name in self._routed.keys() - set(revisions):
            del self._routed[name]

    def route(self, head: str, apps: Mapping[str, AppStatus]) -> bool:
        """Note to which applications of a head requests may go. Returns whether it is another answer than before."""
        _, before = self.routable(head)
        self._routable[head] = apps
        return before != apps

    def routable(self, head: str) -> tuple[Endpoint | None, Mapping[str, AppStatus]]:
        """A head, and the applications to which requests may go."""
        sight = self._seen.get(head)
        return (None, {}) if sight is None else (sight.endpoint, self._routable.get(head, sight.apps))

    def _standing(self, head: str, revision: Revision) -> Standing:
        sight = self._seen.get(head)
        name = revision_name(revision.model, revision.digest)
        mine = () if sight is None else sight.of_revision.get(name, ())
        return Standing(
            sum(app.replicas for app in mine if app.state != "DELETING"),
            any(app_state(app) is RevisionState.READY for app in mine),
        )


def _sight(named: NamedHead) -> Sight:
    endpoint = named.head.load()
    if endpoint is None:
        return Sight(None, {}, {}, {})
    jobs = Jobs(endpoint.dashboard_url, endpoint.token).all()
    apps = ServeApi(endpoint.dashboard_url, endpoint.token).get()
    of_revision: dict[str, list[AppStatus]] = {}
    for name, app in apps.items():
        for revision in _revisions(name):
            of_revision.setdefault(revision, []).append(app)
    return Sight(endpoint, apps, jobs, of_revision)


_DIGEST = re.compile(r"(?=(-[0-9a-f]{8})-)")


def _revisions(app: str) -> list[str]:
    """Names of the revisions that an application may be of, from its own; nearly always one."""
    return [app[: match.end(1)] for match in _DIGEST.finditer(app)]
