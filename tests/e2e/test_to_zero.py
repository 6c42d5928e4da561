"""From zero replicas to some and back on a laptop: nobody who asks is lost, and who runs goes on running."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from laptop import Laptop
from tiny import tiny_model

from fastserve.cluster.access import local_key
from fastserve.cluster.ray_head import RayHead
from fastserve.cluster.ray_serve import ServeApi

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def write(folder: Path, replicas: str) -> str:
    path = folder / "zero.yaml"
    path.write_text(
        "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: zero}\n"
        f"spec: {{source: model, serve: {{context: 512, replicas: {replicas}}}}}\n"
    )
    return str(path)


def replicas(laptop: Laptop) -> list[tuple[str, int | None]]:
    """State and process of every replica that Serve knows of."""
    endpoint = RayHead(laptop.home.path).load()
    assert endpoint is not None
    apps = ServeApi(endpoint.dashboard_url, endpoint.token).get().values()
    return [
        (replica.state, replica.pid)
        for app in apps
        for deployment in (app.deployments or {}).values()
        for replica in deployment.replicas
    ]


def pids(laptop: Laptop) -> set[int]:
    """Processes of the replicas that answer."""
    return {pid for state, pid in replicas(laptop) if state == "RUNNING" and pid is not None}


def count_is(laptop: Laptop, count: int) -> bool:
    """Whether so many replicas answer, and no other one starts or ends."""
    return [state for state, _ in replicas(laptop)] == ["RUNNING"] * count


def ask(laptop: Laptop) -> int:
    """Status of one request through the gateway; it may wait for an engine."""
    port = laptop.home.read_json("gateway/process.json")["port"]
    body = {"model": "zero", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    headers = {"Authorization": f"Bearer {local_key(laptop.home)}"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=400).status_code


class Users:
    """Somebody always asks while the block runs."""

    def __init__(self, laptop: Laptop) -> None:
        self.codes: list[int] = []
        self._laptop, self._over = laptop, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self) -> None:
        while not self._over.is_set():
            self.codes.append(ask(self._laptop))
            time.sleep(0.1)

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_to_zero_and_back_and_to_two_and_back_without_a_loss(serving_laptop: Laptop, tmp_path: Path) -> None:
    laptop = serving_laptop
    tiny_model(tmp_path / "model")
    laptop.run("up", write(tmp_path, "{min: 0, max: 2, idle: 3s}"), "--detach")
    laptop.until(lambda: count_is(laptop, 0), "after quiet no replica is left")

    def said() -> list[tuple[int, int]]:
        return [(one["replicas"], one["weight"]) for one in laptop.json("status", "zero")["revisions"]]

    laptop.until(lambda: said() == [(0, 100)], "the status says so")

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(ask, [laptop] * 4))
    assert codes == [200] * 4, "requests at zero wait for the replica that they start"

    laptop.run("up", write(tmp_path, "{min: 1, max: 1}"), "--detach")
    laptop.until(lambda: count_is(laptop, 1), "more were started for the four, and one of them is left")
    (first,) = pids(laptop)
    with Users(laptop) as users:
        laptop.run("up", write(tmp_path, "{min: 2, max: 2}"), "--detach")
        laptop.until(lambda: count_is(laptop, 2), "a second replica is up")
        assert first in pids(laptop), "another number of replicas replaces none of them"
        laptop.run("up", write(tmp_path, "{min: 1, max: 1}"), "--detach")
        laptop.until(lambda: count_is(laptop, 1), "one is left")
        done = len(users.codes)
        laptop.until(lambda: len(users.codes) >= done + 8, "the one that is left answers")
    assert set(users.codes) == {200}
    (place,) = laptop.json("status", "zero")["revisions"][0]["places"]
    assert place["profile"] == "local"
    assert place["decisions"], "decisions stand in the status, with their reasons"
