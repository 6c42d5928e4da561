"""The applications that serving revisions shall have: on which profile, with how many replicas, with which settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fastserve.artifacts.store import Store
from fastserve.cluster.adapters import adapters_for
from fastserve.cluster.home import Home
from fastserve.cluster.machine import local_hardware
from fastserve.cluster.nodes import hardware_of, machines, with_promised
from fastserve.cluster.parts import Endpoint
from fastserve.cluster.placements import Ground, bounds_of, scaling_of
from fastserve.cluster.ray_serve import AppStatus, ServeApi, app_for, app_name, place_of
from fastserve.cluster.survey import revision_facts
from fastserve.errors import FastServeError
from fastserve.plan.facts import ModelFacts
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.rollout import replica_bounds
from fastserve.spec.serve import Serve


def ground_of(endpoint: Endpoint, api: ServeApi, have: Mapping[str, AppStatus]) -> Ground:
    """What there is to place replicas on. have: what `api.get` has just said."""
    stories = {name: story for name in have if (story := api.scaling(name)) is not None}
    there = with_promised(machines(endpoint.dashboard_url, endpoint.token), endpoint.promised)
    return Ground(there, local_hardware(), have, stories)


class Fleet:
    """All that one home serves."""

    def __init__(self, home: Home, store: Store, say: Callable[[str], None]) -> None:
        """say: takes one sentence for whoever watches."""
        self._home = home
        self._store = store
        self._say = say
        self._told: set[str] = set()
        self._facts: dict[str, ModelFacts] = {}

    def apps(self, revision: Revision, ground: Ground, floor: int = 0) -> list[dict[str, Any]]:
        """The applications that a revision shall have now. floor: replicas that must be up, whatever else is asked.

        One that cannot be made, or whose engine did not come up, stays as it is: it neither takes others with it, nor
        is it tried again and again.
        """
        there = {
            name: dict(status.config)
            for name, status in ground.apps.items()
            if place_of(name, revision.model, revision.digest) is not None and status.config is not None
        }
        failed = {name: there[name] for name in there if ground.apps[name].state == "DEPLOY_FAILED"}
        try:
            found = []
            for bounds in self.bounds(revision, ground, floor):
                name = app_name(revision.model, revision.digest, bounds.profile)
                if name in failed:
                    found.append(failed[name])
                elif bounds.most > 0:
                    found.append(self._app(revision, bounds))
            return found
        except (FastServeError, ValueError) as error:  # the latter: another version wrote it, with keys of its own
            sentence = f"Revision {revision.short} of {revision.model} stays as it is: {error}"
            if sentence not in self._told:
                self._told.add(sentence)
                self._say(sentence)
            return list(there.values())

    def bounds(self, revision: Revision, ground: Ground, floor: int = 0) -> tuple[Bounds, ...]:
        """How many replicas of a revision each profile may have, and why."""
        name, serve = revision.model, self._serve(revision)
        least, most = replica_bounds(serve, self._home.weights(name), revision.digest, self._home.pin(name))
        share = (max(least, floor), max(most, floor))
        return bounds_of(revision, serve, share, self._home.profiles(name), ground, time.time())

    def scaling(self, name: str, endpoint: Endpoint) -> list[dict[str, Any]]:
        """For the status: the places of a model's revisions, with their bounds, what their policies saw and decided.

        Each has revision, profile, min, max, because (why these bounds), requests, decided (why so many replicas) and
        decisions (at, from, to, because; the newest last).
        """
        api = ServeApi(endpoint.dashboard_url, endpoint.token)
        ground = ground_of(endpoint, api, api.get())
        revisions = [revision for revision in self._home.serving().values() if revision.model == name]
        return [item for revision in revisions for item in scaling_of(revision, self.bounds(revision, ground), ground)]

    def _serve(self, revision: Revision) -> Serve:
        """The serve section as the manifest has it now."""
        model = self._home.model(revision.model)
        return (model.spec.serve if model is not None else None) or revision.section()

    def _app(self, revision: Revision, bounds: Bounds) -> dict[str, Any]:
        model = self._home.model(revision.model)
        if revision.digest not in self._facts:
            self._facts[revision.digest] = revision_facts(self._store, revision)
        resolved = self._home.resolved(revision.model)
        return app_for(
            revision,
            self._serve(revision),
            self._home.store_uri,
            self._facts[revision.digest],
            hardware_of(bounds.profile, self._home.profiles(revision.model), local_hardware()),
            bounds,
            adapters=[] if model is None else adapters_for(self._store, model, resolved, revision),
        )
