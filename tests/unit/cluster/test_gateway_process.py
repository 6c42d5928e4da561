"""The gateway of a home as a real process: started, asked for its figures, stopped."""

from __future__ import annotations

import os
import stat
import time

import httpx
import pytest

from fastserve.cluster.access import gateway_keys, local_key
from fastserve.cluster.gateway_process import ADMIN_FILE, GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.local import LocalCluster
from fastserve.cluster.processes import Process, free_port
from fastserve.errors import ClusterFailed, PortInUse
from fastserve.gateway import config as gateway_config


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    return home


def test_it_tells_its_figures_to_its_home_and_to_nobody_else(home):
    process = GatewayProcess(home)
    assert process.stats(0) is None
    port = free_port()
    hold = gateway_config.Hold(seconds=0.0)
    models = {"chat": gateway_config.Served("generate", 1, hold=hold)}
    assert process.configure(models, gateway_keys(home), port)
    assert not process.configure(models, gateway_keys(home), port)
    assert process.stats(0) is None
    process.start(port)
    try:
        began = time.time()
        headers = {"Authorization": f"Bearer {local_key(home)}"}
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
        assert httpx.post(f"{process.url}/chat/completions", json=body, headers=headers).status_code == 503
        stats = process.stats(0)
        assert stats["models"]["chat"]["refused"] == 1
        assert stats["models"]["chat"]["held"] == 0
        assert process.stats(began + 60)["models"]["chat"]["refused"] == 0
        admin = home.read_json(ADMIN_FILE)
        for secret in (admin["token"], admin["orders"]):
            assert secret not in process.config_path.read_text()
        assert stat.S_IMODE((home.path / ADMIN_FILE).stat().st_mode) == 0o600
        assert httpx.get(f"http://127.0.0.1:{admin['port']}/stats", headers=headers).status_code == 401
        assert not process.configure(models, gateway_keys(home), port)  # the door stays where it is
    finally:
        process.stop()
    assert process.stats(0) is None


def test_what_is_configured_is_in_force_when_the_call_returns(home):
    """Who is told that a model is ready asks at once."""
    process = GatewayProcess(home)
    port, hold = free_port(), gateway_config.Hold(seconds=0.0)
    process.configure({}, gateway_keys(home), port)
    process.start(port)
    try:
        headers = {"Authorization": f"Bearer {local_key(home)}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", headers=headers, timeout=60) as client:
            for number in range(20):
                models = {f"model-{number}": gateway_config.Served("generate", 1, hold=hold)}
                assert process.configure(models, gateway_keys(home), port)
                assert [item["id"] for item in client.get("/models").json()["data"]] == list(models)
    finally:
        process.stop()
    assert process.configure({}, gateway_keys(home), port), "one that is not there reads the file when it starts"


def test_another_process_with_its_number_is_not_it_and_is_left_alone(home):
    """This very process stands where a gateway stood before; stopping the gateway must not end it."""
    own = Process.of(os.getpid())
    assert own is not None
    home.write_json("gateway/process.json", {"pid": own.pid, "start_ticks": own.start_ticks - 1, "port": free_port()})
    gateway = GatewayProcess(home)
    assert not gateway.alive()
    gateway.stop()
    home.write_json("gateway/process.json", {"pid": own.pid, "created": 1.5, "port": free_port()})
    assert not gateway.alive(), "as an older version wrote it"
    gateway.stop()
    home.write_json("gateway/process.json", {**own.to_json(), "port": free_port()})
    assert gateway.alive()


MODELS = {"chat": gateway_config.Served("generate", 1, hold=gateway_config.Hold(seconds=0.0))}


@pytest.fixture
def other(tmp_path):
    """The gateway of another home, which runs."""
    home = Home(tmp_path / "other")
    home.create()
    found = GatewayProcess(home)
    port = free_port()
    found.configure(MODELS, (), port)
    found.start(port)
    yield found
    found.stop()


def test_a_port_that_another_home_took_first_is_told_apart_from_a_gateway_that_is_broken(home, other):
    late = GatewayProcess(home)
    late.configure(MODELS, (), other.port)
    with pytest.raises(PortInUse, match=f"port {other.port}"):
        late.start(other.port)
    late.config_path.write_text("no JSON")
    with pytest.raises(ClusterFailed) as broken:
        late.start(free_port())
    assert not isinstance(broken.value, PortInUse)


def test_who_asked_for_no_port_gets_another_one_when_somebody_was_quicker(home, other, monkeypatch):
    cluster = LocalCluster(home)
    monkeypatch.setattr(cluster, "_routes", lambda _: MODELS)
    choose = cluster.gateway.choose_port
    looks = iter([other.port])
    monkeypatch.setattr(cluster.gateway, "choose_port", lambda wanted: next(looks, None) or choose(wanted))
    cluster.keep_gateway({})
    try:
        assert cluster.gateway.alive()
        assert cluster.gateway.port not in (None, other.port)
    finally:
        cluster.gateway.stop()
    by_number = LocalCluster(home, port=other.port)
    monkeypatch.setattr(by_number, "_routes", lambda _: MODELS)
    with pytest.raises(PortInUse):
        by_number.keep_gateway({})
