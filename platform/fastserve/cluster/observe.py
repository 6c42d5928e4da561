"""Look at the home, the store, Ray and the gateway, and write down what is there as one frozen snapshot for each
model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.record import Record
from fastserve.artifacts.store import Store
from fastserve.cluster.home import Home
from fastserve.cluster.live import live_revisions, oldest_replica, windows_of
from fastserve.cluster.ray_jobs import Job, JobState
from fastserve.cluster.ray_serve import AppStatus
from fastserve.errors import StoreFailed
from fastserve.plan import keys
from fastserve.plan.adapters import adapter_keys
from fastserve.plan.observed import Attempt, AttemptState, Committed, Observed
from fastserve.plan.stages import Stage
from fastserve.spec.model import Model

Find = Callable[[Store, Stage, str], Record | None]
"""From a store, a stage and a key to the record of the artifact; None when there is none."""


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
    stats: Mapping[str, Any] | None = None,
    find: Find = attempts.find,
) -> Observed:
    """A snapshot of all that concerns one model.

    jobs: the Ray head's jobs by submission id; empty when there is no head.
    apps: the serving applications by name.
    digests: of the outside sources; by default those of the last `up`.
    stats: what the gateway has counted since the last shift of this model's traffic; None when it does not tell.
    find: looks for a committed artifact.
    """
    digests = home.resolved(model.name) if digests is None else digests
    stage_keys = keys.stage_keys(model, digests)
    committed: dict[str, Committed] = {}
    tried: dict[str, Attempt] = {}
    imports = [(Stage.SOURCE, key) for key in adapter_keys(model, digests).values()]
    for stage, key in [*stage_keys.items(), *imports]:
        record = find(store, stage, key)
        if record is not None:
            committed[key] = Committed(stage, key, record.digest, record.size_bytes, record.metrics)
            continue
        attempt = _newest_attempt(store, model.name, stage, key, jobs)
        if attempt is not None:
            tried[key] = attempt
    tried |= _stale_attempts(model.name, {*stage_keys.values(), *(key for _, key in imports)}, jobs)
    return Observed(
        digests=digests,
        committed=committed,
        attempts=tried,
        forgiven=home.forgiven(model.name),
        revisions=live_revisions(home, model, apps),
        weights=home.weights(model.name),
        shifted_at=home.shifted_at(model.name),
        proven=home.proven(model.name),
        windows=windows_of(stats, home.weights(model.name), home.shifted_at(model.name)),
        cluster_since=oldest_replica(home, model.name, apps),
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
    owner = _claimed_by(store, model, stage, key, number, jobs)
    job = jobs.get(submission_id(owner, stage, key, number))
    if job is not None and job.state in (JobState.PENDING, JobState.RUNNING):
        return Attempt(number, AttemptState.RUNNING, model=owner)
    progress = attempts.read_progress(store, stage, key, number)
    seen_at = progress.get("at") if progress else None
    return Attempt(
        number,
        AttemptState.LOST,
        reason="Lost",
        message=job.message if job is not None else "its process is gone",
        ended_at=(job.ended_at if job is not None and job.ended_at else None) or seen_at or 0.0,
    )


def _claimed_by(store: Store, model: str, stage: Stage, key: str, number: int, jobs: Mapping[str, Job]) -> str:
    """Name of the Model whose attempt it is: models that ask for the same thing share its key, and only one of them
    makes it."""
    if submission_id(model, stage, key, number) in jobs:
        return model
    try:
        return attempts.request_of(store, stage, key, number).model
    except StoreFailed:  # damaged or gone: then no job is known of it either
        return model


_SUBMISSION = re.compile(
    r"(?P<model>.+)-(?P<stage>source|train|compress|evaluate)-(?P<key>[0-9a-f]{12})-(?P<attempt>[0-9]+)"
)


def _stale_attempts(model: str, wanted: set[str], jobs: Mapping[str, Job]) -> dict[str, Attempt]:
    """Running jobs of this model at keys that its manifest no longer leads to, by the first 12 digits of the key."""
    short = {key[:12] for key in wanted}
    found = running_attempts(model, jobs)
    return {key: Attempt(number, AttemptState.RUNNING, model=model) for key, number in found if key not in short}


def running_attempts(model: str, jobs: Mapping[str, Job]) -> list[tuple[str, int]]:
    """The first 12 digits of the key and the number of each attempt of a model that runs, by the jobs alone."""
    found = []
    for name, job in jobs.items():
        match = _SUBMISSION.fullmatch(name)
        if match and match["model"] == model and job.state in (JobState.PENDING, JobState.RUNNING):
            found.append((match["key"], int(match["attempt"])))
    return sorted(found)
