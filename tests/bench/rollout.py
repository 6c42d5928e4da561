"""Rollouts under load: a good new revision is promoted, bad ones are rolled back before many have met them.

The planner, the home, the beat and the gateway process are the real ones; in place of Ray Serve and vLLM stand small
HTTP replicas that fail or dawdle as they are told, so that it takes two minutes. What Ray and a real engine add is in
tests/e2e/test_rollout.py.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tests.bench.figure import Figure

from fastserve.artifacts import attempts
from fastserve.cluster.access import local_key
from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.cluster.processes import free_port
from fastserve.cluster.ray_serve import AppStatus, app_name, route_prefix
from fastserve.plan import keys
from fastserve.plan.moves import Done, Refuse
from fastserve.plan.stages import Stage
from fastserve.spec.load import read
from fastserve.spec.model import Model

DOUBLES = Path(__file__).parents[1] / "doubles"
STEPS = (10, 50, 100)
HOLD_SECONDS = 12.0
REQUESTS_PER_S = 60
BEAT_SECONDS = 1.0
READY_SECONDS = 1.0
QUIET_SECONDS = 3.0
"""Load before the new revision is asked for, and after all is over."""

GOOD = {"ttft_ms": 40.0, "fails_every": 0, "tokens": 8, "gap_ms": 5.0}
FAILING = GOOD | {"fails_every": 20}
SLOW = GOOD | {"ttft_ms": 80.0}
DIGESTS = {"hf://bench/model": "1" * 64}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the replicas answer, in place of a Ray head."""

    serve_port: int
    temp_dir: Path
    dashboard_url: str = ""
    token: str = ""
    serve_host: str = "127.0.0.1"
    python: str = sys.executable

    @property
    def serve_url(self) -> str:
        return f"http://127.0.0.1:{self.serve_port}"


class Head:
    """A process with replicas, in place of a Ray head."""

    def __init__(self, folder: Path) -> None:
        self.behaviours = folder / "behaviours.json"
        self.behaviours.write_text("{}")
        self._endpoint = Endpoint(free_port(9300), folder)
        command = [sys.executable, str(DOUBLES / "engine_replicas.py"), str(self._endpoint.serve_port)]
        self._process = subprocess.Popen([*command, str(self.behaviours)])

    def load(self) -> Endpoint:
        return self._endpoint

    def start(self) -> Endpoint:
        return self._endpoint

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


class Cluster(LocalCluster):
    """The real beat, over replicas that come up in a second, or never."""

    def __init__(self, home: Home, head: Head) -> None:
        super().__init__(home, head=head)
        self._replicas = head
        self._started: dict[str, float] = {}
        self.behaviour: dict[str, float] | None = GOOD
        """Of revisions that are started from now on; None: they crash."""

        self._behaviours: dict[str, dict[str, float] | None] = {}
        self.shifts: list[tuple[float, dict[str, int]]] = []

    def apps(self) -> Mapping[str, AppStatus]:
        found = {}
        for revision in self.home.serving().values():
            name = app_name(revision.model, revision.digest, "local")
            up = time.time() - self._started.get(revision.digest, time.time()) > READY_SECONDS
            if up and self._behaviours.get(revision.digest) is None:
                found[name] = AppStatus(name, "DEPLOY_FAILED", "the engine ended at once", wanted=1)
            else:
                state = "RUNNING" if up else "DEPLOYING"
                found[name] = AppStatus(name, state, replicas=int(up), wanted=1, requests_each=256)
        return found

    def jobs(self) -> Mapping[str, Any]:
        return {}

    def share_with_training(self, beats: object) -> None:
        """Nothing is trained."""

    def _keep_logs(self, jobs: object) -> None:
        """There are no jobs."""

    def _keep_serving(self, without: object = ()) -> None:
        wanted = {revision.digest: revision for revision in self.home.serving().values()}
        for digest in wanted.keys() - self._started.keys():
            self._started[digest], self._behaviours[digest] = time.time(), self.behaviour
        told = {
            route_prefix(revision.model, digest, "local"): behaviour
            for digest, revision in wanted.items()
            if (behaviour := self._behaviours[digest]) is not None
        }
        fresh = self._replicas.behaviours.with_suffix(".new")
        fresh.write_text(json.dumps(told))
        fresh.replace(self._replicas.behaviours)
        if wanted:
            self.keep_gateway()

    def note_shift(self) -> None:
        weights = self.home.weights("bench")
        if not self.shifts or self.shifts[-1][1] != weights:
            self.shifts.append((time.time(), weights))


@dataclass
class Clients:
    """Asks at a steady rate, whatever comes back."""

    url: str
    key: str
    over: threading.Event = field(default_factory=threading.Event)
    asked: int = 0
    failed: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    """Whole answers by the path of the replica that gave them."""

    async def _one(self, session: aiohttp.ClientSession) -> None:
        body = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        self.asked += 1
        try:
            async with session.post(f"{self.url}/chat/completions", json=body) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            self.failed += 1
            return
        if answer.status != 200 or not text.rstrip().endswith("data: [DONE]"):
            self.failed += 1
            return
        path = json.loads(text.split("\n", 1)[0].removeprefix("data: "))["system_fingerprint"]
        self.answers[path] = self.answers.get(path, 0) + 1

    async def _all(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(30)) as session:
            running: set[asyncio.Task[None]] = set()
            due = time.perf_counter()
            while not self.over.is_set():
                task = asyncio.create_task(self._one(session))
                running.add(task)
                task.add_done_callback(running.discard)
                due += 1 / REQUESTS_PER_S
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await asyncio.gather(*running)

    def run(self) -> None:
        asyncio.run(self._all())


def model(context: int) -> Model:
    rollout = f"{{steps: {list(STEPS)}, hold: {HOLD_SECONDS:g}s}}"
    spec = f"{{source: 'hf://bench/model', serve: {{context: {context}, rollout: {rollout}}}}}"
    text = f"apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {{name: bench}}\nspec: {spec}\n"
    (found,) = read(text)
    assert isinstance(found, Model)
    return found


def commit_source(home: Home, cluster: LocalCluster, folder: Path) -> None:
    """The model's bytes, as the source stage leaves them."""
    request = keys.request_for(model(1024), Stage.SOURCE, DIGESTS, 1)
    attempts.claim(cluster.store, request)
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("{}")
    attempts.commit(cluster.store, request, folder / "out", {}, {})


@dataclass(frozen=True, slots=True)
class Story:
    """How one rollout went."""

    asked: int
    failed: int
    touched: float
    """Share of all requests that the new revision answered, failed, or tried."""

    held_seconds: float
    """From the first step to the end of the rollout; 0 when there was none."""

    refusal: str
    promoted: bool


def until(cluster: Cluster, true: Callable[[list[Any]], bool], seconds: float) -> list[Any]:
    """Beat until the moves of the model are such."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        (beat,) = cluster.beat()
        cluster.note_shift()
        if true(list(beat.moves)):
            return list(beat.moves)
        time.sleep(BEAT_SECONDS)
    raise RuntimeError(f"no end within {seconds:.0f} s: {beat.moves}")


def rests(moves: list[Any]) -> bool:
    return all(isinstance(move, Done | Refuse) for move in moves)


def play(behaviour: dict[str, float] | None, say: Callable[[str], None] = lambda _: None) -> Story:
    """A served model, clients, and a new revision that behaves so."""
    folder = Path(tempfile.mkdtemp(prefix="fastserve-rollout-"))
    home, head = Home(folder / "home"), Head(folder)
    home.create()
    cluster = Cluster(home, head)
    try:
        commit_source(home, cluster, folder)
        home.want(model(1024), DIGESTS, {})
        until(cluster, rests, 60)
        (old,) = home.weights("bench")
        cluster.behaviour = behaviour
        assert cluster.gateway.url is not None
        clients = Clients(cluster.gateway.url, local_key(home))
        thread = threading.Thread(target=clients.run)
        thread.start()
        try:
            time.sleep(QUIET_SECONDS)
            home.want(model(512), DIGESTS, {})
            cluster.shifts.clear()
            moves = until(cluster, rests, 20 * HOLD_SECONDS)
            time.sleep(QUIET_SECONDS)
        finally:
            clients.over.set()
            thread.join()
        return _told(cluster, clients, old, moves)
    finally:
        cluster.gateway.stop()
        head.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _told(cluster: Cluster, clients: Clients, old: str, moves: list[Any]) -> Story:
    new = next((digest for digest in cluster.home.revisions("bench") if digest != old), "")
    steps = [(at, weights) for at, weights in cluster.shifts if len(weights) == 2]
    ends = [at for at, weights in cluster.shifts if steps and len(weights) == 1 and at > steps[0][0]]
    began = cluster.shifts[0][0] if cluster.shifts else time.time()
    stats = cluster.gateway.stats(began) or {"models": {}}
    tried = stats["models"].get("bench", {}).get("revisions", {}).get(new, {}).get("requests", 0)
    return Story(
        asked=clients.asked,
        failed=clients.failed,
        touched=tried / clients.asked,
        held_seconds=ends[0] - steps[0][0] if ends else 0.0,
        refusal=next((move.reason for move in moves if isinstance(move, Refuse)), ""),
        promoted=cluster.home.weights("bench") == {new: 100},
    )


def run() -> Iterator[Figure]:
    """About two minutes."""
    good = play(GOOD)
    yield Figure("rollout, good revision: promoted", float(good.promoted), "", "1", good.promoted)
    yield Figure("rollout, good revision: seconds from first step to all traffic", good.held_seconds, "s")
    yield Figure("rollout, good revision: failed requests", good.failed, f"of {good.asked}", "0", good.failed == 0)
    first = STEPS[0] / 100
    for name, behaviour in (("5 % errors", FAILING), ("twice the time to first token", SLOW)):
        story = play(behaviour)
        back, windows = story.refusal == "RolledBack", story.held_seconds / HOLD_SECONDS
        yield Figure(f"rollout, {name}: rolled back", float(back), "", "1", back)
        yield Figure(f"rollout, {name}: windows until it was", windows, "holds", "<= 2", back and windows <= 2)
        touched = story.touched <= first
        yield Figure(f"rollout, {name}: share of requests touched", story.touched, "share", f"<= {first:g}", touched)
        yield Figure(f"rollout, {name}: failed requests", story.failed, f"of {story.asked}", "0", story.failed == 0)
    crash = play(None)
    refused = crash.refusal == "EngineFailed"
    yield Figure("rollout, crash at start: refused by name", float(refused), "", "1", refused)
    yield Figure("rollout, crash at start: share of requests touched", crash.touched, "share", "0", crash.touched == 0)
    yield Figure("rollout, crash at start: failed requests", crash.failed, f"of {crash.asked}", "0", crash.failed == 0)


if __name__ == "__main__":
    for figure in run():
        sys.stdout.write(figure.line() + "\n")
