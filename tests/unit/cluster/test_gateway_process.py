"""The gateway of a home as a real process: started, asked for its figures, stopped."""

from __future__ import annotations

import stat
import time

import httpx
import pytest

from fastserve.cluster.access import gateway_keys, local_key
from fastserve.cluster.gateway_process import ADMIN_FILE, GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.processes import free_port
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
        assert admin["token"] not in process.config_path.read_text()
        assert stat.S_IMODE((home.path / ADMIN_FILE).stat().st_mode) == 0o600
        assert httpx.get(f"http://127.0.0.1:{admin['port']}/stats", headers=headers).status_code == 401
        assert not process.configure(models, gateway_keys(home), port)  # the door stays where it is
    finally:
        process.stop()
    assert process.stats(0) is None
