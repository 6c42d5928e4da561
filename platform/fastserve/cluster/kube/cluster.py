"""One namespace as a cluster: the beat of a laptop with Kubernetes objects for its home, RayClusters for its heads and
a ConfigMap for its gateway.

Everything that decides or acts is `cluster.local`'s; here stands only what a namespace does otherwise: several models
that must not hinder each other, several heads, and objects that are deleted while they work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fastserve.cluster.access import key_of
from fastserve.cluster.known_records import KnownRecords
from fastserve.cluster.kube.api import KubeApi, Object
from fastserve.cluster.kube.finalizer import hold, is_held, release
from fastserve.cluster.kube.gateway import PORT, KubeGateway
from fastserve.cluster.kube.heads import SHARED, Heads, NamedHead, OneHead, own_pool, pool_of
from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.kube.ray import RayClusterHead
from fastserve.cluster.kube.sights import Sights
from fastserve.cluster.live import live_revisions
from fastserve.cluster.local import Beat, LocalCluster
from fastserve.cluster.nodes import machines, profiles_of, with_promised
from fastserve.cluster.observe import running_attempts, submission_id
from fastserve.cluster.parts import Endpoint, Head
from fastserve.cluster.placements import targets_of
from fastserve.cluster.ray_jobs import Job, JobState
from fastserve.cluster.ray_serve import AppStatus, revision_name
from fastserve.errors import FastServeError, StoreFailed
from fastserve.gateway import config as gateway_config
from fastserve.gateway.config import Key
from fastserve.plan.facts import LOCAL
from fastserve.plan.moves import StopAttempt
from fastserve.plan.moving import Stay
from fastserve.plan.stages import StageRequest
from fastserve.spec.model import Model

SILENT_SECONDS = 60.0
"""A head whose work has another place by now, and that has not answered for so long, is given up."""

LOST_SECONDS = 300.0
"""A head that has not answered for so long, and whose pod KubeRay does not call ready, is gone with what ran there."""


class KubeCluster(LocalCluster):
    """What runs for one namespace, behind the same calls as a laptop."""

    def __init__(
        self,
        api: KubeApi,
        home: KubeHome,
        heads: Heads | Head,
        gateway: KubeGateway,
        say: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """heads: where Ray runs; one head alone when it is somebody else's."""
        self._heads = heads if isinstance(heads, Heads) else OneHead(heads)
        super().__init__(home, say=say, head=self._heads.of(SHARED).head, gateway=gateway)
        self._api = api
        self.kube_home = home
        self._gateway = gateway
        self.key_entries: Sequence[Mapping[str, Any]] | None = None
        """Of each AccessKey: name, sha256, models, expires; None before they were looked at."""

        self._sights = Sights(clock)
        self._records = KnownRecords(clock)
        self._find = self._records.find
        self._stays: dict[str, Stay] = {}
        """Where each wanted revision shall be, by its name."""

        self._routed: dict[str, set[str]] = {}
        """Heads that the requests of each model go to."""

        self._served: dict[str, frozenset[str]] = {}
        """What each head was last told to serve."""

        self._there: set[str] | FastServeError | None = None
        self._told: set[str] = set()
        self._unreadable: set[str] = set()
        """Models whose orders could not be found out at the last look."""

    def keys(self) -> tuple[Key, ...]:
        """The namespace's AccessKeys. There is no other key: nobody's own, as on a laptop."""
        return tuple(key_of(entry) for entry in self.key_entries or ())

    def admit(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Let these keys in and no others; what is routed stays. May be called beside everything else."""
        self.key_entries = entries
        self._gateway.admit(self.keys())

    def keep_gateway(self, apps: Mapping[str, AppStatus] | None = None) -> None:
        """As on a laptop; and with nothing to serve any more, no route is left."""
        super().keep_gateway(apps)
        models = [self.home.model(name) for name in self.home.model_names()]
        serves = any(model is not None and model.spec.serve is not None for model in models)
        if not serves and not self.kube_home.damaged:
            self._gateway.configure({}, self.keys(), PORT)

    def keep(self) -> Mapping[str, Job]:
        """What all models share: the heads, Serve's applications and the gateway's orders. Returns all heads' jobs.

        A head that does not answer hinders nobody but its own models: `look` raises for those.
        """
        self._there = None
        self._gateway.admit(self.keys())
        self.look_at_heads()
        self._serve_everywhere(again=True)
        self.keep_gateway()
        self._leave_heads()
        self._tell_rolling()
        self._forget_gone()
        return self.jobs()

    def look_at_heads(self) -> None:
        """Find the heads, and see what each has. Raises ClusterFailed when it is not known which there are."""
        self._heads.look(self._dedicated())
        self.see()

    def look(self, name: str, jobs: Mapping[str, Job] | None = None) -> Beat:
        """As on a laptop. Raises ClusterFailed when the model's head does not answer."""
        trouble = self._sights.trouble(self._named_head(name).name)
        if trouble is not None:
            raise trouble
        self._records.begin(name)
        beat = super().look(name, jobs)
        self._records.end(name, beat.moves)
        return beat

    def ask_anew(self, name: str) -> None:
        """Believe nothing that was seen of a model: it was accepted anew."""
        self._records.forget(name)

    def require(self, model: Model) -> None:
        """Raises NotExecutable when a model asks for what cannot be had here."""
        self._heads.require(model)

    def there(self) -> set[str]:
        """Profiles that the Ray clusters have machines of, or would have when they are asked for; `local` where a
        machine is of no profile. Without a Ray cluster every profile that is described: what is not known refuses
        nobody. It is found out once a look, however many models ask."""
        if self._there is None:
            try:
                self._there = self._find_profiles()
            except FastServeError as error:
                self._there = error
        if isinstance(self._there, FastServeError):
            raise self._there
        return self._there

    def _find_profiles(self) -> set[str]:
        found: set[str] = set()
        trouble: FastServeError | None = None
        for named in self._heads.all():
            try:
                endpoint = None if self._sights.trouble(named.name) else named.head.load()
                those = [] if endpoint is None else machines(endpoint.dashboard_url, endpoint.token)
            except FastServeError as error:
                trouble = error
                continue
            trouble = trouble or self._sights.trouble(named.name)
            those = those if endpoint is None else with_promised(those, endpoint.promised)
            found |= profiles_of(those)
            if any(not machine.profile and machine.cpus >= 1 for machine in those):
                found.add(LOCAL)
        if trouble is not None and not found:
            raise trouble
        return found or {LOCAL, *self.kube_home.described}

    def ray_clusters_of(self, name: str) -> set[str]:
        """Names of the RayClusters that a model's work may be at."""
        pool = self._pool(name)
        mine = [named for named in self._heads.all() if named.pool == pool]
        return {named.head.cluster_name if isinstance(named.head, RayClusterHead) else named.name for named in mine}

    def moves_to(self, name: str) -> tuple[str, str] | None:
        """The RayCluster that a model is on its way to, while its requests go to another one. An empty name, and why,
        when that one cannot be made; None where it is where it belongs."""
        target = self._heads.next_of(self._pool(name))
        return target if target is not None and self._routed.get(name, set()) - {target[0]} else None

    def _submit(self, endpoint: Endpoint, request: StageRequest, entrypoint: str) -> None:
        super()._submit(endpoint, request, entrypoint)
        submission = submission_id(request.model, request.stage, request.key, request.attempt)
        self._sights.begun(self._named_head(request.model).name, Job(submission, JobState.PENDING))

    def require_lead(self) -> None:
        """Before Ray is told anything: the lease may have been lost since the look."""
        self._api.require_lead()

    # -- several heads -----------------------------------------------------------------------------------------------

    def heads(self) -> Sequence[Head]:
        """Every head of the namespace that answers."""
        return [named.head for named in self._heads.all() if self._sights.trouble(named.name) is None]

    def head_of(self, name: str) -> Head:
        """The head at which what a model needs next is started."""
        return self._named_head(name).head

    def see(self) -> None:
        """Take a fresh look at every head."""
        self._sights.look(self._heads.all())

    def jobs(self) -> Mapping[str, Job]:
        """The jobs of all heads, by submission id, as they were seen last."""
        if not self._sights.looked:
            self.see()
        return self._sights.jobs()

    def apps(self) -> Mapping[str, AppStatus]:
        """The serving applications by name. One that two heads have, on its way from one to the other, is shown as the
        head has it that requests go to."""
        if not self._sights.looked:
            self.see()
        return self._sights.apps({name: stay.routed for name, stay in self._stays.items()})

    def share_with_training(self, beats: Sequence[Beat]) -> None:
        """As on a laptop, at each head for itself: a machine of one is of no use to another."""
        by_head: dict[str, list[Beat]] = {}
        for beat in beats:
            by_head.setdefault(self._named_head(beat.model.name).name, []).append(beat)
        for those in by_head.values():
            super().share_with_training(those)

    def _dedicated(self) -> dict[str, Object]:
        """Model objects that ask for a RayCluster of their own, as they were accepted."""
        names = self.home.model_names()
        return {name: self.kube_home.object_of(name) for name in names if self._pool(name) == own_pool(name)}

    def _pool(self, name: str) -> str:
        """The pool that a model's work belongs to. One whose state cannot be read stays where it is."""
        own, model = own_pool(name), self.home.model(name)
        if model is None and name in self.kube_home.damaged:
            return own if any(named.pool == own for named in self._heads.all()) else SHARED
        return pool_of(model)

    def _named_head(self, name: str) -> NamedHead:
        """A model's head. While its own is still to come up, the one that it serves at: of several the one that its
        requests go to, else the newest."""
        wanted = self._heads.of(self._pool(name))
        if wanted.is_up or not self._sights.serves:
            return wanted
        mine = [revision for revision in self.home.serving().values() if revision.model == name]
        others = [head for head in self._heads.all() if head.name != wanted.name]
        answering = [head for head in others if any(self._sights.answers(head.name, item) for item in mine)]
        routed = {self._sights.routed(item) for item in mine}
        return max(reversed(answering), key=lambda head: head.name in routed, default=wanted)

    def _keep_serving(self, without: Collection[str] = ()) -> None:
        self._serve_everywhere(without)

    def _serve_everywhere(self, without: Collection[str] = (), again: bool = False) -> None:
        """Make each head serve what it shall. again: also a head whose part is the same as last time."""
        wanted = self._wanted_revisions()
        self._stays, self._routed = {}, {}
        for name, revision in wanted.items():
            target = self._named_head(revision.model).name
            self._stays[name] = self._sights.stay(name, revision, target)
            self._routed.setdefault(revision.model, set()).add(self._stays[name].routed)
        for named in self._heads.all():
            mine = {name: item for name, item in wanted.items() if named.name in self._stays[name].heads}
            if not (again or without) and self._served.get(named.name) == frozenset(mine):
                continue
            least = {name: stay.least for name, stay in self._stays.items() if name in mine and stay.moves}
            try:
                self._serve_at(named.head, mine, without, least)
                self._served[named.name] = frozenset(mine)
            except FastServeError as error:
                self._served.pop(named.name, None)
                self._sights.note(named.name, error)

    def _route(self, head: Head, apps: Mapping[str, AppStatus]) -> None:
        """Let the gateway go to these applications of a head, and to no others of it."""
        for named in self._heads.all():
            if named.head is head and self._sights.route(named.name, apps):
                self.keep_gateway()

    def _routes(self, apps: Mapping[str, AppStatus]) -> dict[str, gateway_config.Served]:
        """As on a laptop. A model whose head was never seen keeps the orders that are there: who cannot be reached is
        not gone."""
        self._unreadable = set(self.kube_home.damaged)
        models = super()._routes(apps)
        unseen = {name for name in models if self._sights.is_unknown(self._named_head(name).name)} | self._unreadable
        if unseen:
            before = self._gateway.orders()
            for name, served in before.items():
                if name in unseen or served.parent in unseen:
                    models[name] = served
        return models

    def _stats(self, name: str) -> Mapping[str, Any] | None:
        """As on a laptop, while there is something to compare: else many models would ask every gateway for nothing."""
        carrying = sum(weight > 0 for weight in self.home.weights(name).values())
        return super()._stats(name) if carrying > 1 else None

    def _unroutable(self, name: str, error: FastServeError) -> None:
        """It keeps the orders that are there: what is wrong with one model's state is no matter of the others."""
        self._unreadable.add(name)

    def _targets(
        self, name: str, digest: str, profiles: Sequence[str], apps: Mapping[str, AppStatus]
    ) -> tuple[gateway_config.Target, ...]:
        stay = self._stays.get(revision_name(name, digest))
        if stay is None:
            return ()
        endpoint, routable = self._sights.routable(stay.routed)
        return () if endpoint is None else targets_of(name, digest, profiles, routable, endpoint.serve_url)

    def _leave_heads(self) -> None:
        """Give up the heads whose work has another place by now, when nothing runs at them any more."""
        if len(self._heads.all()) == 1:
            return
        models = [name for name in self.home.model_names() if self.home.model(name) is not None]
        kept = {*self._heads.wanted(), *(self._named_head(name).name for name in models)}
        kept |= {head for stay in self._stays.values() for head in stay.heads}
        for named in self._heads.all():
            idle = not named.was_up or self._sights.is_idle(named.name)
            if named.name not in kept and (idle or self._sights.silent_seconds(named.name) > SILENT_SECONDS):
                self._say(f"Ray head {named.name} is given up: its work has another place, and nothing runs there.")
                self.require_lead()
                self._heads.end(named)

    def _forget_gone(self) -> None:
        """Keep nothing in memory of models, revisions and heads that are gone: they come and go for months."""
        self._records.keep_only(self.home.model_names())
        self._sights.keep_only(self._stays)
        heads = {named.name for named in self._heads.all()}
        self._served = {head: names for head, names in self._served.items() if head in heads}
        urls = self._sights.dashboards()
        self._last_put = {url: apps for url, apps in self._last_put.items() if url in urls}

    def _tell_rolling(self) -> None:
        for name, sentence in self._heads.rolling().items():
            if sentence not in self._told:
                self._told.add(sentence)
                self._say(f"RayCluster {name}: {sentence}")

    # -- objects that are deleted while they work ------------------------------------------------------------------

    def hold(self, found: Object) -> None:
        """Put our finalizer on a Model, so that it cannot go while something of it runs."""
        hold(self._api, found)

    def end(self, found: Object) -> str | None:
        """Stop what runs of a Model that was let go, and take the finalizer off when nothing does. Returns what is
        still waited for; None when it may go. Its artifacts stay.

        What runs is told by the heads alone: a store that is away, or a state that went first, as it does when the
        Model is deleted in the foreground, holds nothing up and leaves nothing running.
        """
        if not is_held(found):
            return None
        name = found["metadata"]["name"]
        jobs, apps = self._sights.without(self._lost_heads(name))
        running = running_attempts(name, jobs)
        for key, attempt in running:
            because = f"{name} was deleted, so nobody wants it."
            self._stop_attempt(name, StopAttempt(because=because, key=key, attempt=attempt))
        if running:
            return f"attempt {running[0][1]} at key {running[0][0][:8]} to stop"
        model = self.home.ended(name)
        revisions = () if model is None else live_revisions(self.home, model, apps)
        if revisions:
            return f"revision {revisions[0].digest[:8]} to drain"
        try:
            self.discard_torn(name, jobs)
        except StoreFailed as error:
            self._say(f"What a cut-off attempt of {name} left in the store stays there: {error}")
        release(self._api, found)
        return None

    def _lost_heads(self, name: str) -> set[str]:
        """Heads that are gone for good, so that nothing of a model can run there. Raises ClusterFailed when one that
        it may run at does not answer and may come again."""
        lost = set()
        for named in self._heads.all():
            trouble = self._sights.trouble(named.name)
            if trouble is None or not named.was_up or named.pool not in (SHARED, own_pool(name)):
                continue
            if named.is_up or self._sights.silent_seconds(named.name) < LOST_SECONDS:
                raise trouble
            lost.add(named.name)
        return lost

    def let_go(self, name: str) -> None:
        """Want a Model no longer: no traffic goes to it, and Serve need not have it. Its revisions drain."""
        if name in self.home.model_names():
            self.home.set_weights(name, {})
            self.home.unwant(name)
        mine = [app for app, revision in self.home.serving().items() if revision.model == name]
        for app in mine:
            self.home.stop_serving(app)
        if mine:
            self.keep_gateway()
            self._keep_serving()
