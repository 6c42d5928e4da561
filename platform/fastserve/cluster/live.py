"""What serves and how it does: Serve's applications as revisions with places, the gateway's counts as windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.cluster.home import Home
from fastserve.cluster.ray_serve import AppStatus, place_of, revision_name
from fastserve.plan.observed import LiveRevision, Place, RevisionState, Window
from fastserve.spec.model import Model

_BEST_FIRST = (RevisionState.READY, RevisionState.STARTING, RevisionState.FAILED, RevisionState.STOPPING)


def live_revisions(home: Home, model: Model, apps: Mapping[str, AppStatus]) -> tuple[LiveRevision, ...]:
    """What serves: each wanted revision as Serve sees it, and those that Serve still has though nobody wants them."""
    wanted = {revision.digest for revision in home.serving().values() if revision.model == model.name}
    since = home.serving_since()
    profiles = model.spec.serve.profiles if model.spec.serve is not None else []
    found = []
    for digest in sorted(wanted | home.revisions(model.name).keys()):
        places = _places(model.name, digest, apps, profiles)
        if digest in wanted or places:
            state = _state(places) if digest in wanted else RevisionState.STOPPING
            told = (place.message for place in places if place.state is state and place.message)
            message, replicas = next(told, ""), sum(place.replicas for place in places)
            asked = since.get(revision_name(model.name, digest))
            found.append(LiveRevision(digest, state, message, replicas, places, asked))
    return tuple(found)


def oldest_replica(home: Home, model: str, apps: Mapping[str, AppStatus]) -> float | None:
    """Unix seconds at which the oldest of a model's replicas was asked for, which is after the start of the serving
    cluster; None without replicas."""
    known = home.revisions(model)
    ours = [app for name, app in apps.items() if any(place_of(name, model, digest) is not None for digest in known)]
    deployments = [item for app in ours for item in (app.deployments or {}).values()]
    started = [replica.started_at for item in deployments for replica in item.replicas if replica.started_at > 0]
    return min(started, default=None)


def windows_of(
    stats: Mapping[str, Any] | None, weights: Mapping[str, int], shifted_at: float | None
) -> dict[str, Window]:
    """What the gateway saw of each revision with traffic, by digest; empty when it does not tell.

    stats: as the gateway's `/stats` says it, since `shifted_at`. A revision is counted under its model's name and under
    the names of its adapters: requests are added up, times are those of the name that has most of them.
    """
    if stats is None or shifted_at is None:
        return {}
    seconds = max(0.0, float(stats["at"]) - max(float(stats["started"]), shifted_at))
    found = {}
    for digest in weights:
        names = [item["revisions"][digest] for item in stats["models"].values() if digest in item["revisions"]]
        found[digest] = _window(seconds, names)
    return found


def _window(seconds: float, names: list[Mapping[str, Any]]) -> Window:
    if not names:
        return Window(seconds)
    first = max((item["ttftMs"] for item in names), key=lambda times: int(times["count"]))
    rate = max((item["tokensPerSecond"] for item in names), key=lambda rates: int(rates["count"]))
    return Window(
        seconds=seconds,
        requests=sum(int(item["requests"]) for item in names),
        errors=sum(int(item["errors"]) for item in names),
        ttft_ms=first["p50"],
        ttft_p95_ms=first["p95"],
        first_tokens=int(first["count"]),
        tokens_per_s=rate["p50"],
        slow_tokens_per_s=rate["p5"],
        rates=int(rate["count"]),
    )


def _places(model: str, digest: str, apps: Mapping[str, AppStatus], profiles: list[str]) -> tuple[Place, ...]:
    found = []
    for name, app in apps.items():
        profile = place_of(name, model, digest)
        if profile is not None:
            found.append(Place(profile, app_state(app), app.replicas, app.wanted, app.message))
    order = {profile: at for at, profile in enumerate(profiles)}
    return tuple(sorted(found, key=lambda place: (order.get(place.profile, len(order)), place.profile)))


def app_state(app: AppStatus) -> RevisionState:
    """How an application stands. A light change makes one DEPLOYING for a moment, and a lost replica UNHEALTHY: it
    answers as long as replicas run, and also at rest with none."""
    if app.state == "DELETING":
        return RevisionState.STOPPING
    if app.state == "DEPLOY_FAILED":
        return RevisionState.FAILED
    if app.replicas > 0 or app.state == "RUNNING":
        return RevisionState.READY
    return RevisionState.STARTING


def _state(places: tuple[Place, ...]) -> RevisionState:
    """Of a revision: that of its best place; starting before it has any."""
    states = {place.state for place in places}
    best = next((state for state in _BEST_FIRST if state in states), RevisionState.STARTING)
    # A wanted revision whose last applications are on their way out is about to be put again.
    return RevisionState.STARTING if best is RevisionState.STOPPING else best
