"""One machine as a cluster: a Ray head, a gateway and a home folder, tended by observe → plan → apply.

`beat` is one look and what follows from it. It keeps nothing in mind between two beats that it could not observe
again, so whoever beats next, after a crash or a restart, simply goes on.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.artifacts import attempts
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.access import gateway_keys
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.machine import local_hardware
from fastserve.cluster.observe import observe, submission_id
from fastserve.cluster.processes import kill_home
from fastserve.cluster.ray_head import RayHead
from fastserve.cluster.ray_jobs import Job, Jobs, JobState
from fastserve.cluster.ray_serve import AppStatus, ServeApi, app_for, app_name, route_prefix
from fastserve.cluster.survey import resolve_source, revision_facts
from fastserve.errors import UsageInvalid
from fastserve.gateway import config as gateway_config
from fastserve.plan import keys
from fastserve.plan.facts import ModelFacts
from fastserve.plan.moves import Move, Resolve, RunStage, Shift, StartRevision, StopAttempt, StopRevision, Unpin
from fastserve.plan.observed import AttemptState, Observed
from fastserve.plan.pipeline import next_moves
from fastserve.plan.revision import Revision
from fastserve.spec.model import Model

JOB_ENDED = (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True, slots=True)
class Beat:
    """What one look at one model saw and decided."""

    model: Model
    observed: Observed
    moves: tuple[Move, ...]


class LocalCluster:
    """All of one home's processes and files, behind `beat` and `stop`."""

    def __init__(self, home: Home, port: int | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        """port: the gateway's port when the user asked for one by number. say: takes one sentence for whoever
        watches."""
        self.home = home
        self.store: Store = open_store(home.store_uri)
        self.head = RayHead(home.path)
        self.gateway = GatewayProcess(home)
        self._port = port
        self._say = say
        self._last_put: Any = None
        self._facts: dict[str, ModelFacts] = {}

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
        return beats

    def look(self, name: str, jobs: Mapping[str, Job] | None = None) -> Beat:
        """Observe one model and decide, without doing anything. Raises UsageInvalid when no such model is wanted."""
        model = self.home.model(name)
        if model is None:
            known = ", ".join(self.home.model_names()) or "none"
            raise UsageInvalid(
                f"no model named {name} is up in {self.home.path} (up: {known}); run `fastserve up FILE` first"
            )
        observed = observe(self.home, self.store, model, self.jobs() if jobs is None else jobs, self.apps())
        return Beat(model, observed, tuple(next_moves(model, observed, time.time())))

    def look_back(self, name: str) -> Beat | None:
        """Observe a model that is up no longer; nothing is decided for it. None when there is no such model."""
        model = self.home.ended(name)
        if model is None:
            return None
        return Beat(model, observe(self.home, self.store, model, self.jobs(), {}), ())

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
        for app, status in self.apps().items():
            if status.state == "DEPLOY_FAILED":
                self.home.stop_serving(app)
        self._keep_serving()

    # -- carrying out ------------------------------------------------------------------------------------------------

    def apply(self, model: Model, observed: Observed, move: Move) -> None:
        """Carry out one move. Doing so twice equals doing so once."""
        match move:
            case Resolve():
                self.home.set_resolved(model.name, move.uri, resolve_source(self.home, move.source, move.role).digest)
            case RunStage():
                self._run_stage(move)
            case StopAttempt():
                self._stop_attempt(model, move)
            case StartRevision():
                self._say(move.because)
                self.home.keep_revision(move.revision, time.time())
                self.home.start_serving(app_name(move.revision.model, move.revision.digest), move.revision)
                self._keep_serving()
            case Shift():
                self._say(move.because)
                self.home.set_weights(model.name, move.weights)
                self.keep_gateway()
            case StopRevision():
                self._say(move.because)
                self.home.stop_serving(app_name(model.name, move.digest))
                self._keep_serving()
            case Unpin():
                self._say(move.because)
                self.home.set_pin(model.name, None)
            case _:
                pass  # Wait, Done and Refuse ask for nothing

    def _run_stage(self, move: RunStage) -> None:
        self._say(move.because)
        endpoint = self.head.start()
        request = move.request
        if request.attempt > 1:  # what the one before left is of no use to anybody; its checkpoints stay
            attempts.discard(self.store, request.stage, request.key, request.attempt - 1)
        attempts.claim(self.store, request)
        entrypoint = [
            sys.executable, "-m", "fastserve.stages.entry", "--store", self.home.store_uri,
            "--stage", request.stage.value, "--key", request.key, "--attempt", str(request.attempt),
        ]  # fmt: skip
        Jobs(endpoint.dashboard_url, endpoint.token).submit(
            submission_id(request.model, request.stage, request.key, request.attempt), shlex.join(entrypoint), env={}
        )

    def _stop_attempt(self, model: Model, move: StopAttempt) -> None:
        endpoint = self.head.load()
        if endpoint is None:
            return
        self._say(move.because)
        api = Jobs(endpoint.dashboard_url, endpoint.token)
        for name, job in api.all().items():
            ours = name.startswith(f"{model.name}-") and name.endswith(f"-{move.key[:12]}-{move.attempt}")
            if ours and job.state not in JOB_ENDED:
                api.stop(name)

    def _keep_serving(self) -> None:
        """Make the serving cluster have exactly the wanted applications, with the light settings as the manifests say
        now."""
        wanted = self._wanted_revisions()
        endpoint = self.head.start() if wanted else self.head.load()
        if endpoint is None:
            return
        api = ServeApi(endpoint.dashboard_url, endpoint.token)
        have = api.get()
        if wanted or have:
            apps = [self._app(revision) for revision in wanted.values()]
            config = (endpoint.dashboard_url, apps)
            if config != self._last_put or not set(wanted) <= set(have):
                api.put(apps, endpoint.serve_port)
                self._last_put = config
        if wanted:
            self.keep_gateway()

    def _wanted_revisions(self) -> dict[str, Revision]:
        """Revisions that must be up, by application name; those of a model that nobody wants any more are let go."""
        models = set(self.home.model_names())
        found = self.home.serving()
        for app in [app for app, revision in found.items() if revision.model not in models]:
            self.home.stop_serving(app)
            del found[app]
        return found

    def _app(self, revision: Revision) -> dict[str, Any]:
        model = self.home.model(revision.model)
        serve = (model.spec.serve if model is not None else None) or revision.section()
        if revision.digest not in self._facts:
            self._facts[revision.digest] = revision_facts(self.store, revision)
        return app_for(revision, serve, self.home.store_uri, self._facts[revision.digest], local_hardware())

    def keep_gateway(self) -> None:
        """Make the gateway route what is served and know the keys, and run while a model is to be served."""
        endpoint = self.head.load()
        base = None if endpoint is None else f"http://127.0.0.1:{endpoint.serve_port}"
        models = {}
        for name in self.home.model_names():
            model = self.home.model(name)
            if model is None or model.spec.serve is None:
                continue
            revisions = tuple(
                gateway_config.Revision(digest, weight, () if base is None else (base + route_prefix(name, digest),))
                for digest, weight in sorted(self.home.weights(name).items())
                if weight > 0
            )
            models[name] = gateway_config.Served(model.spec.serve.task, self.home.created(name), revisions)
        if not models:
            return
        port = self.gateway.choose_port(self._port)
        self.gateway.configure(models, gateway_keys(self.home), port)
        self.gateway.start(port)

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
        apps = [app for app, revision in self.home.serving().items() if revision.model == name]
        files = [path for app in apps for path in folder.glob(f"replica_{app}_*.log")]
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
            self._discard_torn(name)
            self.home.unwant(name)
            self.home.set_weights(name, {})
        for app in self.home.serving():
            self.home.stop_serving(app)

    def _discard_torn(self, name: str) -> None:
        """Remove the files of attempts that were cut off; their checkpoints stay, so the next attempt goes on from
        there."""
        model = self.home.model(name)
        if model is None:
            return
        observed = observe(self.home, self.store, model, {}, {})
        stages = {key: stage for stage, key in keys.stage_keys(model, observed.digests).items()}
        for key, attempt in observed.attempts.items():
            if attempt.state is AttemptState.LOST and key in stages:
                attempts.discard(self.store, stages[key], key, attempt.number)
