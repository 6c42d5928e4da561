"""A Ray head with machines of two profiles: an application for each, placed by label, and what when one goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clerk
import httpx
import last_words
import pytest
from ray_nodes import Node

from fastserve.cluster.fleet import ground_of
from fastserve.cluster.home import Home
from fastserve.cluster.nodes import machines, profiles_of
from fastserve.cluster.placements import Ground, bounds_of, targets_of
from fastserve.cluster.ray_head import Endpoint, RayHead
from fastserve.cluster.ray_serve import ServeApi, app_for, beginning
from fastserve.plan.facts import Hardware, ModelFacts
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.hardware import HardwareProfileSpec
from fastserve.spec.serve import Serve

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", parameters=10**6, weight_bytes=2 * 10**6, layers=2, hidden=64, intermediate=128,
    heads=2, kv_heads=1, head_dim=32, vocab=256, max_context=256, tied_embeddings=True, dtype="bfloat16",
)  # fmt: skip
REVISION = Revision("clerk", Stage.SOURCE, "k" * 64, "d" * 64, {})
PROFILES = {
    "fast": HardwareProfileSpec.model_validate({"cpus": 2, "memory": "4GiB"}),
    "slow": HardwareProfileSpec.model_validate({"cpus": 1, "memory": "4GiB"}),
}
SLOTS = 4


class Cluster:
    """The beat of `cluster.local` with a double in the place of the engine."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.api = ServeApi(endpoint.dashboard_url, endpoint.token)
        self.ground: Ground | None = None
        self.bounds: tuple[Bounds, ...] = ()
        self.reasons: set[str] = set()
        """Why each profile had its bounds, so far."""

        self._put: Any = None

    def beat(self, serve: Serve) -> None:
        have = self.api.get()
        self.ground = ground = ground_of(self.endpoint, self.api, have)
        self.bounds = bounds_of(
            REVISION, serve, (serve.replicas.min, serve.replicas.max), PROFILES, ground, time.time()
        )
        self.reasons |= {item.because for item in self.bounds}
        apps = [self._app(serve, item) for item in self.bounds if item.most > 0]
        if apps != self._put or not {app["name"] for app in apps} <= set(have):
            put = [app if app["name"] in have else beginning(app) for app in apps]
            self.api.put(put, self.endpoint.serve_port)
            self._put = apps

    def _app(self, serve: Serve, bounds: Bounds) -> dict[str, Any]:
        made = app_for(REVISION, serve, "file:///nowhere", FACTS, Hardware(cpus=1, memory_bytes=2**32), bounds)
        return clerk.app(made, seconds=0.2, slots=SLOTS)

    def until(self, serve: Serve, true: Callable[[], bool], what: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self.beat(serve)
            if true():
                return
            assert time.monotonic() < deadline, f"{what}: {self.bounds} {self.api.get()}"
            time.sleep(0.3)

    def ready(self) -> dict[str, int]:
        """Replicas that answer, by profile."""
        assert self.ground is not None
        return {name.rpartition("-")[2]: app.replicas for name, app in self.ground.apps.items() if app.replicas}

    def ask(self, serve: Serve) -> httpx.Response:
        apps = self.api.get()
        (first, *_) = targets_of("clerk", REVISION.digest, serve.profiles, apps, self.endpoint.serve_url)
        return httpx.post(first.url + "/v1/chat/completions", json={"max_tokens": 2}, timeout=300)


Join = Callable[[Endpoint, str, int], Node]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("PYTHONPATH", str(clerk.FOLDER))
    last_words.WATCHED["home"] = Home(tmp_path / "home")
    return last_words.WATCHED["home"]


@pytest.fixture
def join(home: Home) -> Iterator[Join]:
    """`join(endpoint, profile, cpus)`: another machine for the head of the home, which ends with all of them."""
    nodes: list[Node] = []

    def add(endpoint: Endpoint, profile: str, cpus: int) -> Node:
        nodes.append(Node(home, endpoint, profile, cpus))
        return nodes[-1]

    yield add
    RayHead(home.path).stop()
    for node in nodes:
        node.wait()
    last_words.WATCHED.clear()


def test_replicas_go_where_their_profile_says_and_spill_over_when_its_machine_is_lost(home: Home, join: Join) -> None:
    endpoint = RayHead(home.path).start()
    fast = join(endpoint, "fast", 2)
    join(endpoint, "slow", 1)
    assert profiles_of(machines(endpoint.dashboard_url, endpoint.token)) == {"local", "fast", "slow"}
    cluster = Cluster(endpoint)
    serve = Serve.model_validate({"profiles": ["fast", "slow"], "replicas": {"max": 2}, "target": {"ttft": "5s"}})

    cluster.until(serve, lambda: cluster.ready() == {"fast": 1}, "the preferred profile serves")
    assert cluster.ask(serve).headers["x-profile"] == "fast"
    assert [(item.profile, item.most) for item in cluster.bounds] == [("fast", 1), ("slow", 0)]

    # Full: more requests at once than the one machine has slots, until the next profile helps.
    with ThreadPoolExecutor(3 * SLOTS) as pool:
        stop = time.monotonic() + 300
        seen: set[str] = set()

        def client() -> list[int]:
            codes = []
            while time.monotonic() < stop and "slow" not in seen:
                answer = httpx.post(
                    f"{endpoint.serve_url}/m/clerk/{REVISION.digest[:8]}/fast/v1/chat/completions", json={}, timeout=60
                )
                codes.append(answer.status_code)
            return codes

        clients = [pool.submit(client) for _ in range(3 * SLOTS)]
        try:
            cluster.until(serve, lambda: cluster.ready() == {"fast": 1, "slow": 1}, "the next profile helps")
        finally:
            seen.add("slow")
        assert {code for future in clients for code in future.result()} == {200}
    assert "Profile slow has 1 to 1: fast may have 1 at most, and is full." in cluster.reasons
    (name,) = (name for name in cluster.api.get() if name.endswith("-fast"))

    def story_is_told() -> bool:
        story = cluster.api.scaling(name) or {}
        return story.get("slots") == SLOTS and story.get("peakRequests", 0) >= 2 * SLOTS

    cluster.until(serve, story_is_told, "the status tells what made it grow")

    # The preferred machine is gone: the other one answers, whatever it does.
    fast.pull_the_plug()
    cluster.until(serve, lambda: cluster.ready() == {"slow": 1}, "the other one answers alone")
    answer = cluster.ask(serve)
    assert (answer.status_code, answer.headers["x-profile"]) == (200, "slow")
    cluster.until(serve, lambda: cluster.bounds[0].most == 0, "Ray has noticed that the machine is gone")
    assert cluster.bounds[1].least == 1
    assert cluster.ask(serve).status_code == 200

    # Another machine of it comes: it takes over, and what serves stays until it does.
    join(endpoint, "fast", 2)
    cluster.until(serve, lambda: cluster.ready().get("fast") == 1, "it comes back")
    assert cluster.ask(serve).headers["x-profile"] == "fast"
