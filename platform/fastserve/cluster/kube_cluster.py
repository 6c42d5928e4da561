"""One namespace as a cluster: the beat of a laptop with Kubernetes objects for its home, a RayCluster for its head and
a ConfigMap for its gateway.

Everything that decides or acts is `cluster.local`'s; here stands only what a namespace does otherwise: several models
that must not hinder each other, and objects that are deleted while they work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastserve.cluster.access import key_of
from fastserve.cluster.kube_api import MODELS, KubeApi, Object
from fastserve.cluster.kube_gateway import PORT, KubeGateway
from fastserve.cluster.kube_home import KubeHome
from fastserve.cluster.local import LocalCluster
from fastserve.cluster.nodes import machines, profiles_of, with_promised
from fastserve.cluster.observe import observe
from fastserve.cluster.parts import Head
from fastserve.cluster.ray_jobs import Job
from fastserve.cluster.ray_serve import AppStatus
from fastserve.gateway.config import Key
from fastserve.plan.facts import LOCAL
from fastserve.plan.moves import StopAttempt
from fastserve.plan.observed import AttemptState

FINALIZER = "fastserve.dev/runs"
"""Stands on a Model from before its first stage starts until nothing of it runs any more."""


class KubeCluster(LocalCluster):
    """What runs for one namespace, behind the same calls as a laptop."""

    def __init__(
        self,
        api: KubeApi,
        home: KubeHome,
        head: Head,
        gateway: KubeGateway,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(home, say=say, head=head, gateway=gateway)
        self._api = api
        self.kube_home = home
        self._gateway = gateway
        self.key_entries: list[Mapping[str, Any]] = []
        """Of each AccessKey: name, sha256, models, expires."""

        self._apps: Mapping[str, AppStatus] | None = None

    def keys(self) -> tuple[Key, ...]:
        """The namespace's AccessKeys. There is no other key: nobody's own, as on a laptop."""
        return tuple(key_of(entry) for entry in self.key_entries)

    def keep_gateway(self, apps: Mapping[str, AppStatus] | None = None) -> None:
        """As on a laptop; and with nothing to serve any more, no route is left."""
        super().keep_gateway(apps)
        models = [self.home.model(name) for name in self.home.model_names()]
        if not any(model is not None and model.spec.serve is not None for model in models):
            self._gateway.configure({}, self.keys(), PORT)

    def apps(self) -> Mapping[str, AppStatus]:
        """As on a laptop, asked once a beat for all models."""
        if self._apps is None:
            self._apps = super().apps()
        return self._apps

    def keep(self) -> Mapping[str, Job]:
        """What all models share: Serve's applications and the gateway's orders. Returns the head's jobs."""
        self._apps = None
        self._gateway.admit(self.keys())
        self._keep_serving()
        self.keep_gateway()
        return self.jobs()

    def there(self) -> set[str]:
        """Profiles that the Ray cluster has machines of, or would have when they are asked for; `local` where a machine
        is of no profile. Without a Ray cluster every profile that is described: what is not known refuses nobody."""
        endpoint = self.head.load()
        if endpoint is None:
            return {LOCAL, *self.kube_home.described}
        found = with_promised(machines(endpoint.dashboard_url, endpoint.token), endpoint.promised)
        of_no_profile = any(not machine.profile and machine.cpus >= 1 for machine in found)
        return profiles_of(found) | ({LOCAL} if of_no_profile else set())

    # -- objects that are deleted while they work ------------------------------------------------------------------

    def hold(self, found: Object) -> None:
        """Put our finalizer on a Model, so that it cannot go while something of it runs."""
        self._set_finalizers(found, sorted({*_finalizers(found), FINALIZER}))

    def end(self, found: Object, jobs: Mapping[str, Job]) -> str | None:
        """Stop what runs of a Model that was let go, and take the finalizer off when nothing does. Returns what is
        still waited for; None when it may go. Its artifacts stay."""
        if FINALIZER not in _finalizers(found):
            return None
        name = found["metadata"]["name"]
        model = self.home.ended(name)
        if model is not None:
            observed = observe(self.home, self.store, model, jobs, self.apps())
            running = [
                StopAttempt(because=f"{name} was deleted, so nobody wants it.", key=key, attempt=attempt.number)
                for key, attempt in sorted(observed.attempts.items())
                if attempt.state is AttemptState.RUNNING and attempt.model == name
            ]
            for move in running:
                self.apply(model, observed, move)
            if running:
                return f"attempt {running[0].attempt} at key {running[0].key[:8]} to stop"
            if observed.revisions:
                return f"revision {observed.revisions[0].digest[:8]} to drain"
        self.discard_torn(name)
        self._set_finalizers(found, [item for item in _finalizers(found) if item != FINALIZER])
        return None

    def let_go(self, name: str) -> None:
        """Want a Model no longer: no traffic goes to it, and Serve need not have it. Its revisions drain."""
        if self.home.model(name) is not None:
            self.home.set_weights(name, {})
            self.home.unwant(name)
        mine = [app for app, revision in self.home.serving().items() if revision.model == name]
        for app in mine:
            self.home.stop_serving(app)
        if mine:
            self.keep_gateway()
            self._keep_serving()

    def _set_finalizers(self, found: Object, wanted: list[str]) -> None:
        if wanted == _finalizers(found):
            return
        metadata = found["metadata"]
        patch = {"metadata": {"finalizers": wanted}}
        changed = self._api.merge(MODELS, metadata["namespace"], metadata["name"], patch, metadata["resourceVersion"])
        found["metadata"] = changed["metadata"]


def _finalizers(found: Object) -> list[str]:
    return list(found["metadata"].get("finalizers") or ())
