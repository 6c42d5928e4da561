"""A whole cluster in one process, so that a fault can be put before or after any one of its calls.

The operator's own code is the real one, from the look to the bytes that it would send. In place of the API server stand
the objects of `kube_objects`, in place of Ray's head the few routes that it is asked for; a job of that head runs the
real entry of a stage (`stages.entry.run_attempt`) around a stage that takes no time.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from kube_objects import KubeObjects
from kubernetes import client
from model_files import write_model

from fastserve.artifacts import attempts
from fastserve.artifacts.folder_store import FolderStore
from fastserve.artifacts.store import Checksum
from fastserve.artifacts.stores import open_store
from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.kube.ray import GivenRay
from fastserve.cluster.nodes import PROFILE_LABEL
from fastserve.cluster.ray_rest import RayRest
from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.entry import run_attempt
from fastserve.stages.work import Outcome, Work
from fastserve_operator.model import Namespace

RAY = "http://ray.example:8265"
INTERVAL = {"value": 0.01, "low": 0.01, "high": 0.01}


class Killed(BaseException):
    """The operator's process ends here: nothing catches it, and nothing is said."""


@dataclass
class Moments:
    """Numbers the calls of a run, and does something at one of them."""

    at: int = 0
    """The call at which it happens, from 1; 0 for never."""

    after: bool = False
    """Whether that call is carried out before it happens."""

    happens: Callable[[], None] = lambda: None
    only: str = ""
    """Counts calls whose name begins so: `kube`, `ray`, `store`."""

    reads: bool = False
    """Whether calls that change nothing are counted too."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def around(self, what: str, call: Callable[[], Any], reads: bool = False) -> Any:
        """Make the call."""
        if (reads and not self.reads) or not what.startswith(self.only):
            return call()
        self.count += 1
        self.named.append(what)
        if self.count != self.at:
            return call()
        if not self.after:
            self.happens()
            return call()
        answer = call()
        self.happens()
        return answer


class Api(KubeApi):
    """The operator's client, with the objects at the other end of the wire."""

    def __init__(self, objects: KubeObjects, moments: Moments) -> None:
        super().__init__(client.ApiClient(client.Configuration()))
        self._objects = objects
        self._moments = moments

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, Any] | None, content: str
    ) -> tuple[int, dict[str, Any]]:
        words = {key: [str(value)] for key, value in (query or {}).items()}
        sent = json.loads(json.dumps(body))

        def call() -> tuple[int, dict[str, Any]]:
            return self._objects.answer(method, unquote(path), words, sent, content)

        return self._moments.around(f"kube {method} {path}", call, reads=method == "GET")  # type: ignore[no-any-return]


class CountedStore(FolderStore):
    """A store whose writes are counted."""

    def __init__(self, root: Path, moments: Moments) -> None:
        super().__init__(root)
        self._moments = moments

    def write(self, name: str, data: bytes) -> None:
        self._moments.around(f"store write {name}", lambda: super(CountedStore, self).write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        return bool(self._moments.around(f"store create {name}", lambda: super(CountedStore, self).create(name, data)))

    def delete(self, name: str) -> None:
        self._moments.around(f"store delete {name}", lambda: super(CountedStore, self).delete(name))

    def delete_under(self, prefix: str) -> None:
        self._moments.around(f"store delete_under {prefix}", lambda: super(CountedStore, self).delete_under(prefix))

    def put_file(self, name: str, source: Path) -> Checksum:
        raise AssertionError("the operator brings no file into the store")


class Ray:
    """A Ray head: jobs that run when they are told to, and Serve applications that come up."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.ran: list[str] = []
        """Submission ids of the attempts whose stage was begun, in order."""

        self.apps: dict[str, dict[str, Any]] = {}
        self.moments = Moments()
        self.down = 0
        """So many calls get no answer."""

        self.holds = False
        """While set, what runs goes on running."""

        self.keeps = ""
        """Jobs with this in their name go on running."""

        self._lock = threading.Lock()

    def call(self, rest: RayRest, method: str, path: str, *, value: Any = None, **_: Any) -> httpx.Response:
        """In the place of `RayRest.call`."""

        def answer() -> httpx.Response:
            if self.down:
                self.down -= 1
                raise rest.failed(httpx.Response(503, text="no answer"), "do that")
            status, told = self.answer(method, path, json.loads(json.dumps(value)))
            return httpx.Response(status, json=told)

        return self.moments.around(f"ray {method} {path}", answer, reads=method == "GET")  # type: ignore[no-any-return]

    def answer(self, method: str, path: str, value: Any) -> tuple[int, Any]:
        """Status and body of one call."""
        with self._lock:
            return self._answer(method, path, value)

    def _answer(self, method: str, path: str, value: Any) -> tuple[int, Any]:
        name = path.split("/")[3]
        if path.startswith("/api/serve/"):
            return self._serve(method, value)
        if path.startswith("/api/v0/nodes"):
            node = {"state": "ALIVE", "resources_total": {"CPU": 4}, "labels": {PROFILE_LABEL: "local"}}
            return 200, {"data": {"result": {"result": [node]}}}
        if path == "/api/jobs/":
            return (200, list(self.jobs.values())) if method == "GET" else self._submit(value)
        if path.startswith("/api/jobs/") and name in self.jobs:
            if path.endswith("/stop") and self.jobs[name]["status"] in ("PENDING", "RUNNING"):
                self.jobs[name]["status"] = "STOPPED"
            return 200, self.jobs[name]
        return 404, {}

    def _submit(self, value: Any) -> tuple[int, Any]:
        name = value["submission_id"]
        if name in self.jobs:
            return 500, {"message": f"Job with submission_id {name} already exists"}
        told = (value.get("runtime_env") or {}).get("env_vars") or {}
        self.jobs[name] = {
            "submission_id": name,
            "status": "PENDING",
            "entrypoint": value["entrypoint"],
            "environment": told,
        }
        return 200, {"submission_id": name}

    def _serve(self, method: str, value: Any) -> tuple[int, Any]:
        if method == "PUT":
            wanted = {app["name"]: app for app in value["applications"]}
            for name in [name for name in self.apps if name not in wanted]:
                self.apps[name]["status"] = "DELETING"
            for name, app in wanted.items():
                had = self.apps.get(name, {"status": "DEPLOYING", "deployments": {}})
                self.apps[name] = {**had, "deployed_app_config": app, "last_deployed_time_s": time.time()}
        return 200, {"applications": self.apps}

    def go_on(self) -> None:
        """What is under way gets done."""
        with self._lock:
            if not self.holds:
                self._go_on()

    def _go_on(self) -> None:
        for name, job in self.jobs.items():
            if job["status"] == "PENDING" and not (self.keeps and self.keeps in name):
                words = dict(re.findall(r"--(store|stage|key|attempt) (\S+)", job["entrypoint"]))
                store = open_store(words["store"])
                stage, key, number = Stage(words["stage"]), words["key"], int(words["attempt"])

                def begun(work: Work, name: str = name) -> Outcome:
                    self.ran.append(name)
                    return small_stage(work)

                ended = run_attempt(store, attempts.request_of(store, stage, key, number), begun)
                job["status"] = "FAILED" if ended else "SUCCEEDED"
        self.apps = {name: app for name, app in self.apps.items() if app["status"] != "DELETING"}
        for name, app in self.apps.items():
            replica = {"state": "RUNNING", "replica_id": name, "node_id": "n", "start_time_s": 1.0, "pid": 1}
            engine = {"status": "HEALTHY", "replicas": [replica], "target_num_replicas": 1}
            app |= {"status": "RUNNING", "deployments": {"engine": engine}}

    @property
    def running(self) -> list[str]:
        """Jobs that have not ended."""
        with self._lock:
            return [name for name, job in self.jobs.items() if job["status"] in ("PENDING", "RUNNING")]


@contextmanager
def served_ray(ray: Ray) -> Iterator[str]:
    """The head behind HTTP, at this URL; what is under way gets done by and by."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in two packets would wait for the client's acknowledgement

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _do(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, told = ray.answer(self.command, self.path, json.loads(raw) if raw else None)
            text = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _do  # noqa: N815

    over = threading.Event()

    def work() -> None:
        while not over.wait(0.1):
            ray.go_on()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True),
        threading.Thread(target=work, daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join()


def small_stage(work: Work) -> Outcome:
    """A stage of any kind: a small model, and of an evaluation good figures."""
    request: StageRequest = work.request
    folder = work.scratch / "outcome" / "model"
    write_model(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "made_by": request.stage.value}))
    if request.stage is not Stage.EVALUATE:
        return Outcome(folder.parent, {})
    models = {role: {"digest": work.input_record(role).digest} for role in ("candidate", "parent")}
    measured = {"rows": 20, "models": models, "perplexityIncrease": INTERVAL}
    return Outcome(folder.parent, measured | {"klDivergence": INTERVAL, "flippedTokens": INTERVAL})


class SmallCluster:
    """The objects, the head and the store, and one operator after the other in front of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = KubeObjects()
        self.ray = Ray()
        self.moments = Moments()
        self.acts: Callable[[], bool] = lambda: True

    def operator(self) -> Namespace:
        """A process that has just started; what one before it had in mind is lost."""
        self.ray.moments = self.moments
        api = Api(self.objects, self.moments).acting_only_while(self.acts)
        home = KubeHome(api, "demo", self.folder / "scratch", str(self.folder / "store"))
        home.create()
        gateway = KubeGateway(api, "demo", None, addresses=lambda _: [])  # its pods are silent
        cluster = KubeCluster(api, home, GivenRay(RAY, None, None, "python"), gateway)
        cluster.store = CountedStore(self.folder / "store", self.moments)
        return Namespace(api, "demo", cluster, self.acts)


@contextmanager
def small_cluster(folder: Path) -> Iterator[SmallCluster]:
    """A cluster in a folder; while the block runs, every Ray head that is called is its one."""
    found = SmallCluster(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayRest, "call", lambda rest, *words, **more: found.ray.call(rest, *words, **more))
        yield found
