"""A Model with a RayCluster of its own, on a real API server, at a real Ray head that is killed: a new head, at another
address, is given everything anew, and who asked meanwhile gets an answer."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import kubernetes.config
import pytest
from control_plane import Cluster
from helm_chart import Helm, objects
from tiny import tiny_model

from fastserve.cluster import processes
from fastserve.cluster.home import Home
from fastserve.cluster.kube.api import KubeApi
from fastserve.cluster.kube.cluster import KubeCluster
from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.kube.home import KubeHome
from fastserve.cluster.kube.ray_clusters import RayClusters
from fastserve.cluster.ray_head import Endpoint, RayHead
from fastserve_operator.conditions import attempted
from fastserve_operator.model import Namespace

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

MODEL = "alone"


@dataclass
class Heads:
    """Real heads, one after the other; KubeRay's part, by hand."""

    folder: Path
    homes: list[Home] = field(default_factory=list)
    endpoint: Endpoint | None = None

    def start(self) -> Endpoint:
        """A head in a home of its own, so at another address."""
        home = Home(self.folder / f"ray-{len(self.homes)}")
        home.create()
        self.homes.append(home)
        self.endpoint = RayHead(home.path).start()
        return self.endpoint

    def kill(self) -> None:
        """SIGKILL to all of it, as when its machine is lost."""
        for process in processes.find(self.homes[-1].id):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def urls(self, namespace: str, service: str) -> tuple[str, str]:
        """Where the head's Service leads to."""
        assert self.endpoint is not None
        return self.endpoint.dashboard_url, self.endpoint.serve_url

    def stop(self) -> None:
        """Leave nothing behind."""
        for home in self.homes:
            RayHead(home.path).stop()
            processes.kill_home(home.id)


@dataclass
class World:
    """The namespace, its operator in this process, and the gateway as a process."""

    cluster: Cluster
    namespace: str
    tended: Namespace
    folder: Path

    def kubectl(self, *words: str, text: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, text=text).stdout

    def get(self, what: str) -> dict[str, Any]:
        return dict(json.loads(self.kubectl("get", what, "-o", "json")))

    def look(self) -> None:
        attempted(self.tended.tend)
        orders = json.loads(self.get("configmap/fastserve-gateway")["data"]["config.json"])
        without = ("adminSha256", "ordersSha256")  # an admin port is not asked for
        mine = {key: value for key, value in orders.items() if key not in without}
        text = json.dumps({**mine, "host": "127.0.0.1", "port": 0, "adminPort": 0})
        place = self.folder / "config.json"
        if not place.exists() or place.read_text() != text:  # as the kubelet renews a volume
            place.with_suffix(".new").write_text(text)
            place.with_suffix(".new").replace(place)

    def until(self, true: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + 600
        while not (found := true()):
            assert time.monotonic() < end, f"never: {what}: {self.get(f'model/{MODEL}').get('status')}"
            self.look()
            time.sleep(0.3)
        return found

    def ready(self) -> dict[str, Any]:
        conditions = self.get(f"model/{MODEL}").get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == "Ready"), {})

    def address(self) -> str:
        """Where the gateway listens, at the port that it was given."""
        end = time.monotonic() + 300
        while True:
            told = (self.folder / "gateway.log").read_text()
            found = re.search(r'"event": "listening", "address": "([^"]+)"', told)
            if found:
                return found[1]
            assert time.monotonic() < end, told
            time.sleep(0.1)

    def ask(self, key: str) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        url = f"{self.address()}/v1/chat/completions"
        return httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=600)


@pytest.fixture
def heads(tmp_path: Path) -> Iterator[Heads]:
    made = Heads(tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def world(
    ray_definitions: Cluster, operator_kubeconfig: Path, namespace: str, helm: Path, heads: Heads, tmp_path: Path
) -> Iterator[World]:
    rendered = Helm(helm, ray_definitions.environment).rendered("--show-only", "templates/ray.yaml")
    (template,) = (item for item in objects(rendered) if item["kind"] == "ConfigMap")
    template["metadata"]["namespace"] = namespace
    ray_definitions.kubectl("apply", "-f", "-", text=json.dumps(template))
    api = KubeApi(kubernetes.config.new_client_from_config(str(operator_kubeconfig)))
    home = KubeHome(api, namespace, tmp_path / "scratch", str(tmp_path / "store"))
    home.create()
    clusters = RayClusters(api, namespace, "fastserve-ray", sys.executable, heads.urls)
    gateway = KubeGateway(api, namespace, None, addresses=lambda _: [])
    found = World(
        ray_definitions, namespace, Namespace(api, namespace, KubeCluster(api, home, clusters, gateway)), tmp_path
    )
    found.look()
    with open(tmp_path / "gateway.log", "ab") as log:
        words = [sys.executable, "-m", "fastserve.gateway", "--config", str(tmp_path / "config.json")]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield found
    finally:
        process.kill()
        process.wait()


def test_a_lost_head_is_given_everything_anew(world: World, heads: Heads, tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    spec = {"source": f"file://{tmp_path}/model", "cluster": "dedicated", "serve": {"context": 1024}}
    for kind, name, wanted in (("Model", MODEL, spec), ("AccessKey", "team", {"models": [MODEL]})):
        value = {"apiVersion": "fastserve.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": wanted}
        world.kubectl("apply", "-f", "-", text=json.dumps(value))
    selector = f"fastserve.dev/pool=dedicated,fastserve.dev/model={MODEL}"
    named = world.until(lambda: world.kubectl("get", "raycluster", "-l", selector, "-o", "name"), "it is made").strip()

    def up() -> None:
        """What KubeRay does when a head runs."""
        token = base64.b64encode(heads.start().token.encode()).decode()
        patch = json.dumps({"data": {"auth_token": token}})
        world.kubectl("patch", f"secret/{MODEL}-ray-token", "--type=merge", "-p", patch)
        status = json.dumps({"status": {"state": "ready", "head": {"serviceName": "head-svc"}}})
        world.kubectl("patch", named, "--subresource=status", "--type=merge", "-p", status)

    up()
    world.until(lambda: world.ready().get("status") == "True", "it is served")
    key = base64.b64decode(world.get("secret/team-key")["data"]["key"]).decode()
    assert world.ask(key).status_code == 200
    heads.kill()
    told: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: told.append(world.ask(key)), daemon=True)
    asking.start()
    world.until(lambda: world.ready()["reason"] == "ClusterFailed", "it says that the head is away")
    up()
    world.until(lambda: not asking.is_alive(), "who asked meanwhile has an answer")
    assert [answer.status_code for answer in told] == [200], told[0].text
    world.until(lambda: world.ready()["status"] == "True", "it is served again")
    world.kubectl("delete", f"model/{MODEL}", "accesskey/team", "--wait=false")
    world.until(lambda: not world.kubectl("get", "models,rayclusters", "-l", selector, "-o", "name"), "it is gone")
    world.until(lambda: not world.kubectl("get", "models", "-o", "name"), "the Model is gone")
