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
from fastserve.cluster.processes import Process, free_port
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
