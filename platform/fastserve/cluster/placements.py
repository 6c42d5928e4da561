"""Where the replicas of a revision run: looks at machines, applications and what their policies noted, and asks
`plan.placement`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastserve.cluster.direct import engines_of
from fastserve.cluster.nodes import Machine, hardware_of, room
from fastserve.cluster.ray_serve import AppStatus, app_name, place_of, route_prefix
from fastserve.gateway.config import Target
from fastserve.plan.facts import Hardware
from fastserve.plan.placement import Bounds, Place, place
from fastserve.plan.revision import Revision
from fastserve.plan.sharing import Need
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.model import Model
from fastserve.spec.serve import Serve

FRESH_SECONDS = 30.0
"""What a policy noted before that says nothing of now: it is not asked while there is no replica."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What there is to place replicas on, and what is on it."""

    machines: Sequence[Machine]
    local: Hardware
    apps: Mapping[str, AppStatus]
    """By name."""

    stories: Mapping[str, Mapping[str, Any]]
    """What each application's policy noted last, by name."""


def bounds_of(
    revision: Revision,
    serve: Serve,
    replicas: tuple[int, int],
    profiles: Mapping[str, HardwareProfileSpec],
    ground: Ground,
    now: float,
) -> tuple[Bounds, ...]:
    """How many replicas of a revision each profile may have, in the order in which they are used.

    serve: as the manifest has it now. replicas: bounds of the revision over all profiles. profiles: specs of the
    HardwareProfiles by name. now: Unix seconds.
    """
    parallel = revision.section().engine.tensor_parallel or 1
    looks = [_look(revision, profile, parallel, profiles, ground, now) for profile in serve.profiles]
    return place(looks, *replicas, now)


def _look(
    revision: Revision,
    profile: str,
    parallel: int,
    profiles: Mapping[str, HardwareProfileSpec],
    ground: Ground,
    now: float,
) -> Place:
    hardware = hardware_of(profile, profiles, ground.local)
    name = app_name(revision.model, revision.digest, profile)
    app, story = ground.apps.get(name), ground.stories.get(name) or {}
    spec = profiles.get(profile)
    ready = 0 if app is None else app.replicas
    fresh = now - float(story.get("at", 0.0)) < FRESH_SECONDS
    slots = max(1, ready) * (0 if app is None or not fresh else app.requests_each)
    accelerator = None if spec is None else spec.accelerator
    return Place(
        profile=profile,
        room=room(ground.machines, profile, hardware, parallel),
        ready=ready,
        wanted=0 if app is None else app.wanted,
        waiting_since=None if app is None else app.waiting_since,
        failed=app is not None and app.state == "DEPLOY_FAILED",
        busy=float(story.get("requests", 0.0)) / slots if slots else 0.0,
        busy_peak=float(story.get("peakRequests", 0.0)) / slots if slots else 0.0,
        kind=f"{accelerator.count} {accelerator.type} {accelerator.memory}" if accelerator is not None else "",
        spot=spec is not None and spec.spot,
        price_per_hour=None if spec is None else spec.price_per_hour,
        tokens_per_s=float(story.get("tokensPerSecond", 0.0)),
    )


def targets_of(
    model: str,
    digest: str,
    profiles: Sequence[str],
    apps: Mapping[str, AppStatus],
    base: str,
    engines: Mapping[str, str] | None = None,
) -> tuple[Target, ...]:
    """Where a revision answers, for the gateway: each profile with ready replicas, and the requests that they take.

    profiles: of the manifest, the preferred one first. base: URL of Serve's proxy. engines: as `engine_urls` finds
    them; they are gone to directly, and to Serve's proxy go the requests that one of them lost. While nothing is ready,
    one target with the requests of one replica: Serve holds them, and starts it.
    """
    found, waiting = [], []
    for name, app in apps.items():
        profile = place_of(name, model, digest)
        if profile is None or app.state in ("DELETING", "DEPLOY_FAILED"):
            continue
        rank = profiles.index(profile) if profile in profiles else len(profiles)
        target = Target(base + route_prefix(model, digest, profile), app.replicas * app.requests_each, profile, rank)
        direct = engines_of(app, engines or {})
        found += [Target(url, app.requests_each, profile, rank) for url in direct]
        if app.replicas:
            found.append(replace(target, last=bool(direct)))
        else:
            stuck = app.waiting_since is not None
            waiting.append(((stuck, rank), Target(target.url, app.requests_each, profile, rank)))
    if found or not waiting:
        return tuple(sorted(found, key=lambda target: target.rank))
    return (min(waiting, key=lambda item: item[0])[1],)


def needs_of(model: Model, revisions: Sequence[Revision], apps: Mapping[str, AppStatus]) -> list[Need]:
    """For each profile of a model, over its revisions: replicas that hold a machine, and those that wait for one."""
    found = []
    for profile in model.spec.serve.profiles if model.spec.serve is not None else ():
        named = (app_name(revision.model, revision.digest, profile) for revision in revisions)
        those = [apps[name] for name in named if name in apps]
        replicas = [replica for app in those for item in (app.deployments or {}).values() for replica in item.replicas]
        held = sum(replica.node is not None for replica in replicas)
        waiting = sum(replica.node is None and replica.state == "STARTING" for replica in replicas)
        since = [app.waiting_since for app in those if app.waiting_since is not None] if waiting else []
        found.append(Need(model.name, profile, replicas=held, waiting=waiting, since=min(since, default=None)))
    return found


def scaling_of(revision: Revision, bounds: Sequence[Bounds], ground: Ground) -> list[dict[str, Any]]:
    """For the status: each place of a revision, with its bounds and what its policy saw last and decided."""
    found = []
    for item in bounds:
        story = ground.stories.get(app_name(revision.model, revision.digest, item.profile)) or {}
        found.append(
            {
                "revision": revision.digest,
                "profile": item.profile,
                "min": item.least,
                "max": item.most,
                "because": item.because,
                "requests": story.get("requests", 0.0),
                "decided": story.get("because", ""),
                "decisions": list(story.get("decisions", ())),
            }
        )
    return found
