"""One machine as a cluster: a Ray head, a gateway and a home folder, tended by observe → plan → apply.

`beat` is one look and what follows from it. It keeps nothing in mind between two beats that it could not observe
again, so whoever beats next, after a crash or a restart, simply goes on.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.access import gateway_keys
from fastserve.cluster.direct import engine_urls
from fastserve.cluster.fleet import Fleet, ground_of
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.nodes import kinds_of
from fastserve.cluster.observe import Find, observe, running_attempts, submission_id
from fastserve.cluster.parts import Endpoint, Gateway, Head
from fastserve.cluster.placements import needs_of, targets_of
from fastserve.cluster.processes import kill_home
from fastserve.cluster.ray_head import RayHead
from fastserve.cluster.ray_jobs import Job, Jobs, JobState
from fastserve.cluster.ray_serve import AppStatus, ServeApi, beginning, place_of, revision_name
from fastserve.cluster.routing import routes_of
from fastserve.cluster.sharing import share_machines
from fastserve.cluster.survey import resolve_source
from fastserve.errors import FastServeError, PortInUse, UsageInvalid
from fastserve.gateway import config as gateway_config
from fastserve.plan import keys
from fastserve.plan.adapters import adapter_keys
from fastserve.plan.moves import (
    Move,
    Resolve,
    RollBack,
    RunStage,
    Shift,
    StartRevision,
    StopAttempt,
    StopRevision,
    Unpin,
)
from fastserve.plan.observed import AttemptState, Observed
from fastserve.plan.pipeline import next_moves
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.model import Model

GATEWAY_TRIES = 3
JOB_ENDED = (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True, slots=True)
class Beat:
    """What one look at one model saw and decided."""

    model: Model
    observed: Observed
    moves: tuple[Move, ...]


class LocalCluster:
    """All of one home's processes and files, behind `beat` and `stop`."""

    def __init__(
        self,
        home: Home,
        port: int | None = None,
        say: Callable[[str], None] = lambda _: None,
        head: Head | None = None,
        gateway: Gateway | None = None,
    ) -> None:
        """port: the gateway's port when the user asked for one by number. say: takes one sentence for whoever
        watches. head, gateway: where Ray runs and what routes; by default processes of this home."""
        self.home = home
        self.store: Store = open_store(home.store_uri)
        self.head: Head = head or RayHead(home.path)
        self.gateway: Gateway = gateway or GatewayProcess(home)
        self._port = port
        self._say = say
        self._last_put: dict[str, Any] = {}
        """What was put last, by the head's address."""

        self._find: Find = attempts.find
        self.fleet = Fleet(home, self.store, say)

    # -- one look ------------------------------------------------------------------------------------------------

    def beat(self) -> list[Beat]:
        """Look at every wanted model and carry out what is due."""
        self._keep_serving()
        jobs = self.jobs()
        self._keep_logs(jobs)
        beats = [self.look(name, jobs) for name in self.home.model_names()]
        for beat in beats:
            for move in beat.moves:
                self.apply(beat.model, beat.observed, move)
        self.share_with_training(beats)
        return beats

    def look(self, name: str, jobs: Mapping[str, Job] | None = None) -> Beat:
        """Observe one model and decide, without doing anything. Raises UsageInvalid when no such model is wanted."""
        model = self.home.model(name)
        if model is None:
            known = ", ".join(self.home.model_names()) or "none"
            raise UsageInvalid(
                f"no model named {name} is up in {self.home.path} (up: {known}); run `fastserve up FILE` first"
            )
        jobs = self.jobs() if jobs is None else jobs
        observed = observe(self.home, self.store, model, jobs, self.apps(), stats=self._stats(name), find=self._find)
        return Beat(model, observed, tuple(next_moves(model, observed, time.time())))

    def look_back(self, name: str) -> Beat | None:
        """Observe a model that is up no longer; nothing is decided for it. None when there is no such model."""
        model = self.home.ended(name)
        if model is None:
            return None
        return Beat(model, observe(self.home, self.store, model, self.jobs(), {}), ())

    def _stats(self, name: str) -> Mapping[str, Any] | None:
        """What the gateway has counted since the model's traffic was last shared out anew."""
        shifted_at = self.home.shifted_at(name) if self.home.weights(name) else None
        return None if shifted_at is None else self.gateway.stats(shifted_at)

    def heads(self) -> Sequence[Head]:
        """Every head that something of ours may run at; a home has one."""
        return (self.head,)

    def head_of(self, name: str) -> Head:
        """The head at which what a model needs next is started."""
        return self.head

    def jobs(self) -> Mapping[str, Job]:
        """The Ray head's jobs by submission id; empty when no head runs."""
        endpoint = self.head.load()
        return {} if endpoint is None else Jobs(endpoint.dashboard_url, endpoint.token).all()

    def apps(self) -> Mapping[str, AppStatus]:
        """The serving applications by name; empty when no head runs."""
        endpoint = self.head.load()
        return {} if endpoint is None else ServeApi(endpoint.dashboard_url, endpoint.token).get()

    def forget_failed(self) -> None:
        """Take away applications whose engine did not come up: asking again is trying again."""
        apps = self.apps()
        failed = {name for name, status in apps.items() if status.state == "DEPLOY_FAILED"}
        for name, revision in self.home.serving().items():
            those = {app for app in apps if place_of(app, revision.model, revision.digest) is not None}
            if those and those <= failed:
                self.home.stop_serving(name)
        self._keep_serving(without=failed)

    def require_lead(self) -> None:
        """Raise StateChanged when another process decides by now. A home's lock sees to it that there is no other."""

    # -- carrying out ------------------------------------------------------------------------------------------------

    def apply(self, model: Model, observed: Observed, move: Move) -> None:
        """Carry out one move. Doing so twice equals doing so once."""
        match move:
            case Resolve():
                self.home.set_resolved(model.name, move.uri, resolve_source(self.home, move.source, move.role).digest)
            case RunStage():
                self._run_stage(move)
            case StopAttempt():
                self._stop_attempt(model.name, move)
            case StartRevision():
                self._say(move.because)
                self.home.keep_revision(move.revision, time.time())
                self.home.start_serving(revision_name(move.revision.model, move.revision.digest), move.revision)
                self._keep_serving()
            case Shift():
                self._say(move.because)
                self.home.set_weights(model.name, move.weights, move.because)
                self.keep_gateway()
            case StopRevision():
                self._say(move.because)
                self.home.stop_serving(revision_name(model.name, move.digest))
                self._keep_serving()
            case RollBack():
                self._say(move.because)
                self.home.set_pin(model.name, move.pin)
            case Unpin():
                self._say(move.because)
                self.home.set_pin(model.name, None)
            case _:
                pass  # Wait, Done and Refuse ask for nothing

    def _run_stage(self, move: RunStage) -> None:
        self._say(move.because)
        request = move.request
        endpoint = self.head_of(request.model).start()
        self.require_lead()
        if request.attempt > 1:  # what the one before left is of no use to anybody; its checkpoints stay
            attempts.discard(self.store, request.stage, request.key, request.attempt - 1)
        if not attempts.take(self.store, request):
            return  # another model asks for the same thing, and makes it
        entrypoint = [
            endpoint.python, "-m", "fastserve.stages.entry", "--store", self.home.store_uri,
            "--stage", request.stage.value, "--key", request.key, "--attempt", str(request.attempt),
        ]  # fmt: skip
        self.require_lead()
        self._submit(endpoint, request, shlex.join(entrypoint))

    def _submit(self, endpoint: Endpoint, request: StageRequest, entrypoint: str) -> None:
        submission = submission_id(request.model, request.stage, request.key, request.attempt)
        Jobs(endpoint.dashboard_url, endpoint.token).submit(submission, entrypoint, kinds_of(endpoint.promised))

    def _stop_attempt(self, model: str, move: StopAttempt) -> None:
        endpoints = [endpoint for head in self.heads() if (endpoint := head.load()) is not None]
        if endpoints:
            self._say(move.because)
        for endpoint in endpoints:
            api = Jobs(endpoint.dashboard_url, endpoint.token)
            for name, job in api.all().items():
                if (move.key[:12], move.attempt) in running_attempts(model, {name: job}):
                    self.require_lead()
                    api.stop(name)

    def _keep_serving(self, without: Collection[str] = ()) -> None:
        """Make the serving cluster have exactly the wanted applications, with the light settings as the manifests say
        now. without: names of applications that are left out this time."""
        self._serve_at(self.head, self._wanted_revisions(), without)

    def _serve_at(
        self,
        head: Head,
        wanted: Mapping[str, Revision],
        without: Collection[str] = (),
        least: Mapping[str, int] | None = None,
    ) -> None:
        """Make one head serve exactly these revisions. least: replicas of some of them that must be up, by name."""
        endpoint = head.start() if wanted else head.load()
        if endpoint is None:
            return
        api = ServeApi(endpoint.dashboard_url, endpoint.token)
        have = api.get()
        if wanted or have:
            ground = ground_of(endpoint, api, have)
            floors = least or {}
            apps = [app for key, item in wanted.items() for app in self.fleet.apps(item, ground, floors.get(key, 0))]
            apps = [app for app in apps if app["name"] not in without]
            names = {app["name"] for app in apps}
            # What nobody wants was put by one who thought that he still decides.
            foreign = any(name not in names and status.state != "DELETING" for name, status in have.items())
            if foreign or apps != self._last_put.get(endpoint.dashboard_url) or not names <= set(have):
                self._route(head, {name: have[name] for name in names if name in have})
                put = [app if app["name"] in have else beginning(app) for app in apps]
                self.require_lead()
                api.put(put, endpoint.serve_port, endpoint.serve_host)
                self._last_put[endpoint.dashboard_url] = apps
        if wanted:
            self._route(head, {name: have[name] for name in names if name in have})

    def _route(self, head: Head, apps: Mapping[str, AppStatus]) -> None:
        """Let the gateway go to these applications of a head, and to no others of it."""
        self.keep_gateway(apps)

    def _wanted_revisions(self) -> dict[str, Revision]:
        """Revisions that must be up, by name; those of a model that nobody wants any more are let go."""
        models = set(self.home.model_names())
        found = self.home.serving()
        for name in [name for name, revision in found.items() if revision.model not in models]:
            self.home.stop_serving(name)
            del found[name]
        return found

    def share_with_training(self, beats: Sequence[Beat]) -> None:
        """Let training runs give way to replicas that find no machine, and take their machines back afterwards."""
        models = {beat.model.name: beat.model for beat in beats}
        revisions = list(self.home.serving().values())
        apps = self.apps() if revisions else {}
        needs = [
            need
            for model in models.values()
            for need in needs_of(model, [item for item in revisions if item.model == model.name], apps)
        ]
        observed = {beat.model.name: beat.observed for beat in beats}
        for sentence in share_machines(self.store, models, observed, needs, time.time()):
            self._say(sentence)

    def scaling(self, name: str) -> list[dict[str, Any]]:
        """For the status: the places of a model's revisions, as `Fleet.scaling` tells them; empty when no head runs."""
        endpoint = self.head_of(name).load()
        return [] if endpoint is None else self.fleet.scaling(name, endpoint)

    def keep_gateway(self, apps: Mapping[str, AppStatus] | None = None) -> None:
        """Make the gateway route what is served and know the keys, and run while a model is to be served.

        apps: the applications to route to, by name; those that Serve has when left out.
        """
        models = self._routes(self.apps() if apps is None else apps)
        if not models:
            return
        for tries_left in reversed(range(GATEWAY_TRIES)):
            port = self.gateway.choose_port(self._port)
            self.gateway.configure(models, self.keys(), port)
            try:
                self.gateway.start(port)
                return
            except PortInUse:
                # Another home's gateway was quicker; who asked for no number gets another one.
                if self._port is not None or not tries_left:
                    raise

    def _routes(self, apps: Mapping[str, AppStatus]) -> dict[str, gateway_config.Served]:
        """The gateway's orders for every model that is to be served, and for its adapters."""
        return routes_of(
            self.home,
            self.store,
            lambda name, digest, profiles: self._targets(name, digest, profiles, apps),
            self._unroutable,
        )

    def _unroutable(self, name: str, error: FastServeError) -> None:
        """Said of a model whose orders cannot be found out."""
        raise error

    def _targets(
        self, name: str, digest: str, profiles: Sequence[str], apps: Mapping[str, AppStatus]
    ) -> tuple[gateway_config.Target, ...]:
        """Where a revision answers."""
        endpoint = self.head.load()
        if endpoint is None:
            return ()
        return targets_of(name, digest, profiles, apps, endpoint.serve_url, engine_urls(endpoint.temp_dir))

    def keys(self) -> tuple[gateway_config.Key, ...]:
        """Who may ask, as the gateway needs it."""
        return gateway_keys(self.home)

    def _keep_logs(self, jobs: Mapping[str, Job]) -> None:
        """Keep the log of every job that ended; Ray's own copy goes with the head."""
        endpoint = self.head.load()
        if endpoint is None:
            return
        for name, job in jobs.items():
            path = self.home.path / "logs" / f"{name}.log"
            if job.state in JOB_ENDED and not path.exists():
                path.write_text(Jobs(endpoint.dashboard_url, endpoint.token).logs(name))

    def refresh_gateway(self) -> None:
        """Let a gateway that runs know of changed keys at once; when none runs, the next start reads them."""
        if self.gateway.alive():
            self.keep_gateway()

    def job_log(self, submission: str) -> str:
        """What a job has written so far; empty when no head runs."""
        endpoint = self.head.load()
        return "" if endpoint is None else Jobs(endpoint.dashboard_url, endpoint.token).logs(submission)

    def serve_log(self, name: str) -> str:
        """What the model's replicas have written, newest last. Raises UsageInvalid when nothing runs."""
        endpoint = self.head.load()
        if endpoint is None:
            raise UsageInvalid(f"nothing is up in {self.home.path}; run `fastserve up FILE` first")
        folder = endpoint.temp_dir / "session_latest" / "logs" / "serve"
        names = [item for item, revision in self.home.serving().items() if revision.model == name]
        files = [path for item in names for path in folder.glob(f"replica_{item}-*.log")]
        return "".join(
            path.read_text(errors="replace") for path in sorted(files, key=lambda path: path.stat().st_mtime)
        )

    # -- the end -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End every process of this home, and take away what torn attempts left. Nothing that was committed is
        touched."""
        self.gateway.stop()
        self.head.stop()
        kill_home(self.home.id)
        for name in self.home.model_names():
            self.discard_torn(name)
            self.home.unwant(name)
            self.home.set_weights(name, {})
        for app in self.home.serving():
            self.home.stop_serving(app)
        self.home.clear_torn()
        if self.home.has_own_store:
            self.store.sweep("artifacts/", 0.0)  # whoever wrote to it has just been ended

    def discard_torn(self, name: str, jobs: Mapping[str, Job] | None = None) -> None:
        """Remove the files of attempts that were cut off; their checkpoints stay, so the next attempt goes on from
        there. jobs: that still run, of other models with the same keys; none when left out."""
        model = self.home.model(name) or self.home.ended(name)
        if model is None:
            return
        observed = observe(self.home, self.store, model, jobs or {}, {})
        stages = {key: stage for stage, key in keys.stage_keys(model, observed.digests).items()}
        stages |= dict.fromkeys(adapter_keys(model, observed.digests).values(), Stage.SOURCE)
        for key, attempt in observed.attempts.items():
            if attempt.state is AttemptState.LOST and key in stages:
                attempts.discard(self.store, stages[key], key, attempt.number)
