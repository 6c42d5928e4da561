"""A forwarded port: opened, used, closed, and what kubectl says when it cannot."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import port_forward
import pytest
from kube_objects import KubeObjects, kubeconfig, served

from fastserve.cluster.kube.config import Reached, reach
from fastserve.cluster.kube.forward import forwarded
from fastserve.errors import ClusterFailed, UsageInvalid


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reached:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with served(KubeObjects()) as api:
        return reach(kubeconfig(api, tmp_path / "kubeconfig"), None, "models")


def test_it_leads_there_while_the_block_runs(place: Reached, tmp_path: Path) -> None:
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write((self.headers["Authorization"] or "").encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Hello)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        port_forward.install(tmp_path / "bin", {"head:8265": server.server_port})
        with forwarded(place, "head", 8265) as url:
            assert httpx.get(url, headers={"Authorization": "Bearer x"}, trust_env=False).text == "Bearer x"
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (words,) = port_forward.asked(tmp_path / "bin")
    assert words[:5] == ["--context", "small", "-n", "models", "port-forward"]


def test_kubectls_own_words_are_told(place: Reached, tmp_path: Path) -> None:
    port_forward.install(tmp_path / "bin", {})
    by_hand = "kubectl --context small -n models port-forward service/head 8265"
    with pytest.raises(ClusterFailed, match=f'`{by_hand}` does not get through: .*services "head" not found'):
        forwarded(place, "head", 8265).__enter__()


def test_without_kubectl_it_is_said_what_is_missing(place: Reached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageInvalid, match="kubectl is not on PATH"):
        forwarded(place, "head", 8265).__enter__()
