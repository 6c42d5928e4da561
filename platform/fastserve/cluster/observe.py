"""Look at the home, the store, Ray and the gateway, and write down what is there as one frozen snapshot for each
model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.cluster.home import Home
from fastserve.cluster.ray_jobs import Job, JobState
from fastserve.cluster.ray_serve import AppStatus, app_name
from fastserve.plan import keys
from fastserve.plan.observed import Attempt, AttemptState, Committed, LiveRevision, Observed, RevisionState
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model


def submission_id(model: str, stage: Stage, key: str, attempt: int) -> str:
    """Name of the Ray job of an attempt: the same attempt always has the same name, so it cannot be submitted twice."""
    return f"{model}-{stage}-{key[:12]}-{attempt}"


def observe(
    home: Home,
    store: Store,
    model: Model,
    jobs: Mapping[str, Job],
    apps: Mapping[str, AppStatus],
    digests: Mapping[str, str] | None = None,
) -> Observed:
    """A snapshot of all that concerns one model.

    jobs: the Ray head's jobs by submission id; empty when there is no head.
    apps: the serving applications by name.
    digests: of the outside sources; by default those of the last `up`.
    """
    digests = home.resolved(model.name) if digests is None else digests
    stage_keys = keys.stage_keys(model, digests)
    committed: dict[str, Committed] = {}
    tried: dict[str, Attempt] = {}
    for stage, key in stage_keys.items():
        record = attempts.find(store, stage, key)
        if record is not None:
            committed[key] = Committed(stage, key, record.digest, record.size_bytes, record.metrics)
            continue
        attempt = _newest_attempt(store, model.name, stage, key, jobs)
        if attempt is not None:
            tried[key] = attempt
    tried |= _stale_attempts(model.name, set(stage_keys.values()), jobs)
    return Observed(
        digests=digests,
        committed=committed,
        attempts=tried,
        forgiven=home.forgiven(model.name),
        revisions=_live_revisions(home, model.name, apps),
        weights=home.weights(model.name),
        pin=home.pin(model.name),
        known_revisions=home.revisions(model.name),
    )


def _newest_attempt(store: Store, model: str, stage: Stage, key: str, jobs: Mapping[str, Job]) -> Attempt | None:
    number = attempts.newest_attempt(store, stage, key)
    if number == 0:
        return None
    failure = attempts.failure(store, stage, key, number)
    if failure is not None:
        return Attempt(
            number,
            AttemptState.FAILED,
            reason=failure.get("reason", "StageFailed"),
            message=failure.get("message", ""),
            final=bool(failure.get("final")),
            ended_at=failure.get("at"),
        )
    job = jobs.get(submission_id(model, stage, key, number))
    if job is not None and job.state in (JobState.PENDING, JobState.RUNNING):
        return Attempt(number, AttemptState.RUNNING, model=model)
    progress = attempts.read_progress(store, stage, key, number)
    seen_at = progress.get("at") if progress else None
    return Attempt(
        number,
        AttemptState.LOST,
        reason="Lost",
        message=job.message if job is not None else "its process is gone",
        ended_at=(job.ended_at if job is not None and job.ended_at else None) or seen_at or 0.0,
    )


_SUBMISSION = re.compile(
    r"(?P<model>.+)-(?P<stage>source|train|compress|evaluate)-(?P<key>[0-9a-f]{12})-(?P<attempt>[0-9]+)"
)


def _stale_attempts(model: str, wanted: set[str], jobs: Mapping[str, Job]) -> dict[str, Attempt]:
    """Running jobs of this model at keys that its manifest no longer leads to, by the first 12 digits of the key."""
    short = {key[:12] for key in wanted}
    found: dict[str, Attempt] = {}
    for name, job in jobs.items():
        match = _SUBMISSION.fullmatch(name)
        running = job.state in (JobState.PENDING, JobState.RUNNING)
        if match and running and match["model"] == model and match["key"] not in short:
            found[match["key"]] = Attempt(int(match["attempt"]), AttemptState.RUNNING, model=model)
    return found


_STATES = {
    "RUNNING": RevisionState.READY,
    "DEPLOY_FAILED": RevisionState.FAILED,
    "DELETING": RevisionState.STOPPING,
}


def _live_revisions(home: Home, model: str, apps: Mapping[str, AppStatus]) -> tuple[LiveRevision, ...]:
    """What serves: each wanted application as Serve sees it, and those that Serve still has though nobody wants
    them."""
    wanted = {app: revision for app, revision in home.serving().items() if revision.model == model}
    by_app = {app: revision.digest for app, revision in wanted.items()}
    for digest, value in home.revisions(model).items():
        name = app_name(value["model"], digest)
        if name in apps:
            by_app.setdefault(name, digest)
    found = []
    for app, digest in sorted(by_app.items()):
        status = apps.get(app)
        if status is None:
            state, message, replicas = RevisionState.STARTING, "", 0
        else:
            state, message, replicas = (
                _STATES.get(status.state, RevisionState.STARTING),
                status.message,
                status.replicas,
            )
        if app not in wanted:
            state = RevisionState.STOPPING
        found.append(LiveRevision(digest, state, message, replicas))
    return tuple(found)
