"""Orders to several real gateways, and their figures as of one."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from kube_objects import KubeObjects, served

from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.kube.gateway_pods import AGAIN_SECONDS, SILENT_SECONDS, GatewayPods, addresses_of
from fastserve.gateway import config as gateway_config
from fastserve.gateway.app import Gateway
from fastserve.gateway.config import Config, Revision, Served, Target
from fastserve.gateway.keys import digest
from fastserve.gateway.statistics import Statistics
from fastserve.gateway.together import together

ORDERS = "/api/v1/namespaces/demo/configmaps/fastserve-gateway"
SECRETS = "/api/v1/namespaces/demo/secrets"


@contextmanager
def pod(host: str, port: int, config: Config) -> Iterator[Gateway]:
    """A gateway's admin port on an address of its own, as each pod has one."""
    up, stop = threading.Event(), threading.Event()
    made: list[Any] = []

    async def life() -> None:
        gateway = Gateway(config)
        runner = web.ServerRunner(gateway.admin.server, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        made.append(gateway)
        up.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        await runner.cleanup()
        await gateway.close(0.0)

    thread = threading.Thread(target=asyncio.run, args=(life(),), daemon=True)
    thread.start()
    assert up.wait(120)
    try:
        yield made[0]
    finally:
        stop.set()
        thread.join(120)


class Stand:
    """The objects, the operator's side of the gateway, and pods that come and go."""

    def __init__(self, stack: ExitStack) -> None:
        self.objects = KubeObjects()
        self.now = 1000.0
        self.there: list[str] = []
        self._stack = stack
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._api = stack.enter_context(served(self.objects))
        self.gateway = self.operator()

    def operator(self) -> KubeGateway:
        """An operator's process, or the next one."""
        url = f"http://gateways:{self.port}"
        return KubeGateway(self._api, "demo", None, url, addresses=lambda _: self.there, clock=lambda: self.now)

    def start(self, host: str) -> Gateway:
        """A pod as it starts: with the orders that its volume holds."""
        return self._stack.enter_context(pod(host, self.port, self.written()))

    def written(self) -> Config:
        return gateway_config.parse(json.loads(self.objects.objects[ORDERS]["data"]["config.json"]))

    def token(self, name: str) -> str:
        return base64.b64decode(self.objects.objects[f"{SECRETS}/{name}"]["data"]["token"]).decode()

    def put(self, host: str, config: Config, token: str) -> int:
        text = json.dumps(gateway_config.to_json(config))
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(trust_env=False) as client:
            return client.put(f"http://{host}:{self.port}/orders", content=text, headers=headers).status_code


@pytest.fixture
def stand() -> Iterator[Stand]:
    with ExitStack() as stack:
        yield Stand(stack)


def models(*weights: int) -> dict[str, Served]:
    target = (Target("http://127.0.0.1:9/m"),)
    return {"chat": Served("generate", 1, tuple(Revision(str(at) * 64, w, target) for at, w in enumerate(weights)))}


def test_every_gateway_has_new_orders_at_once_and_a_late_volume_changes_nothing(stand: Stand) -> None:
    stand.gateway.configure(models(100), (), 8100)
    pods = [stand.start(host) for host in ("127.0.0.1", "127.0.0.2")]
    stand.there = ["127.0.0.1", "127.0.0.2"]
    old = stand.written()
    assert stand.gateway.configure(models(50, 50), (), 8100)
    assert [gateway.config for gateway in pods] == [stand.written()] * 2
    assert not pods[0].take(old)
    assert pods[0].config == stand.written()
    assert stand.put("127.0.0.1", old, stand.token("fastserve-gateway-orders")) == 409


def test_a_gateway_that_comes_or_was_away_is_sent_them_with_the_next_look(stand: Stand) -> None:
    stand.gateway.configure(models(100), (), 8100)
    late = stand.start("127.0.0.1")
    stand.gateway.configure(models(1, 99), (), 8100)  # its name is not known yet
    stand.there = ["127.0.0.1", "127.0.0.3"]  # the second one hangs, or its machine is lost
    assert not stand.gateway.configure(models(1, 99), (), 8100)
    assert late.config == stand.written()
    late.replace(
        Config(admin_port=1, orders_sha256=late.config.orders_sha256)
    )  # its process began anew, with an old volume
    stand.now += AGAIN_SECONDS + SILENT_SECONDS
    stand.gateway.admit(())
    assert late.config == stand.written()


def test_numbers_go_up_even_when_somebody_removed_the_configmap(stand: Stand) -> None:
    stand.gateway.configure(models(100), (), 8100)
    before = stand.written().serial
    stand.gateway.configure(models(50, 50), (), 8100)
    assert stand.written().serial > before
    before = stand.written().serial
    del stand.objects.objects[ORDERS]
    stand.operator().configure(models(100), (), 8100)
    assert stand.written().serial >= before


def test_the_token_for_figures_gives_no_orders_and_the_other_way_round(stand: Stand) -> None:
    stand.gateway.configure(models(100), (), 8100)
    gateway = stand.start("127.0.0.1")
    newer = replace(stand.written(), models={}, serial=stand.written().serial + 1)
    for token in (stand.token("fastserve-gateway-admin"), "x", newer.orders_sha256):
        assert stand.put("127.0.0.1", newer, token) == 401
    url, orders = f"http://127.0.0.1:{stand.port}", stand.token("fastserve-gateway-orders")
    with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {orders}"}) as client:
        assert client.get(f"{url}/stats").status_code == 401
        assert client.get(f"{url}/orders").status_code == 405
        for wrong in ("{", "[]", '{"nonsense": 1}', '"' * 9, "[" * 100_000):
            assert client.put(f"{url}/orders", content=wrong).status_code == 400
        assert client.put(f"{url}/orders", content=" " * 2**21).status_code == 413
    assert gateway.config == stand.written()


def test_figures_are_those_of_all_gateways(stand: Stand) -> None:
    stand.gateway.configure(models(100), (), 8100)
    assert stand.gateway.stats(0) is None
    pods = [stand.start(host) for host in ("127.0.0.1", "127.0.0.2")]
    stand.there = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    for number, gateway in enumerate(pods):
        for _ in range(number + 1):
            run = gateway.statistics.run("chat", "0" * 64)
            run.first()
            run.end(tokens=5, error=number == 1)
    told = stand.gateway.stats(0)
    assert told is not None
    revision = told["models"]["chat"]["revisions"]["0" * 64]
    assert (revision["requests"], revision["errors"], revision["tokens"]) == (3, 2, 15)
    assert revision["ttftMs"]["count"] == 3
    assert told["started"] == min(gateway.statistics.started for gateway in pods)


@given(st.lists(st.lists(st.floats(0.2, 60_000), max_size=20), min_size=1, max_size=4))
def test_figures_of_several_equal_those_of_one_that_saw_it_all(shared: list[list[float]]) -> None:
    def told(times: list[float]) -> dict[str, Any]:
        statistics = Statistics(lambda: 1000.0)
        for ms in times:
            track = statistics.run("m", "d")._track
            track.running -= 1
            for tally in statistics.now(track):
                tally.requests += 1
                tally.first.add(ms)
                tally.each.add(ms / 10)
            statistics.held("m", ms / 1000)
        return statistics.to_json(0, {"m": Served("generate", 0, (Revision("d", 1, ()),))}, lambda _: 2, steps=True)

    whole = told([ms for times in shared for ms in times])["models"]["m"]
    found = json.loads(json.dumps(together([told(times) for times in shared])))["models"]["m"]
    assert found["held"] == 2 * len(shared)
    one, all_of_them = whole["revisions"]["d"], found["revisions"]["d"]
    assert all_of_them["requests"] == one["requests"]
    for key in ("ttftMs", "tokensPerSecond"):
        wanted = {name: value for name, value in one[key].items() if name not in ("steps", "sumMs")}
        mean, mean_of_all = wanted.pop("mean", None), all_of_them[key].pop("mean", None)
        assert all_of_them[key] == wanted
        assert (mean or 0) == pytest.approx(mean_of_all or 0, rel=1e-3)  # sums of floats in another order
    assert found["heldMs"]["count"] == whole["heldMs"]["count"]


def test_a_name_leads_to_addresses_or_nowhere() -> None:
    assert addresses_of("127.0.0.1") == ["127.0.0.1"]
    assert addresses_of("no host name" * 40) == []


def test_a_token_that_opens_the_admin_port_of_a_gateway_without_one_for_orders_gives_none(stand: Stand) -> None:
    stand.gateway.configure(models(100), (), 8100)
    gateway = stand.start("127.0.0.1")
    gateway.replace(replace(stand.written(), orders_sha256=""))
    for token in ("x", digest("")):
        assert stand.put("127.0.0.1", stand.written(), token) == 401


def test_names_that_nobody_answers_for_are_not_asked_for_at_every_look() -> None:
    now, asked = [100.0], []

    def hangs(host: str) -> list[str]:
        asked.append(host)
        now[0] += 10
        return []

    pods = GatewayPods("http://gateways:1", hangs, lambda: now[0])
    for _ in range(3):
        pods.send("{}", "t")
        assert pods.stats(0, "t") is None
    assert asked == ["gateways"]
    now[0] += SILENT_SECONDS
    pods.send("{}", "t")
    assert asked == ["gateways"] * 2
