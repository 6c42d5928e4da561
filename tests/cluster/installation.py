"""FastServe installed on a whole cluster by its chart, with images that were built here and folders for claims."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tiny
import yaml
from images import SITE_PACKAGES, Image
from network import inside
from whole_cluster import WholeCluster

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/fastserve"
NAMESPACE = "models"
USER = 1000
"""Who runs in the pods."""

FIRST_NODE = {"kubernetes.io/hostname": "node0"}

SITE = Path(sys.prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
ASK_SECONDS = 300.0


@dataclass
class Installation:
    """A release of the chart. What is asked goes through the gateway's Service, by its address in the cluster."""

    cluster: WholeCluster
    inputs: Path
    """The folder that pods see as /store/inputs."""

    key: str = ""

    @property
    def artifacts(self) -> Path:
        """Where the store keeps what stages have made."""
        return self.inputs.parent / NAMESPACE / "artifacts"

    def kubectl(self, *words: str, text: str | None = None, check: bool = True) -> str:
        """kubectl in the release's namespace."""
        return self.cluster.kubectl("-n", NAMESPACE, *words, text=text, check=check).stdout

    def fastserve(self, *words: str, seconds: float = 300) -> str:
        """`kubectl fastserve`, as its user runs it."""
        folder = self.cluster.folder / "bin"
        folder.mkdir(exist_ok=True)
        plugin = folder / "kubectl-fastserve"
        command = "from fastserve.cli.main import plugin; plugin()"
        plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{command}" "$@"\n')
        plugin.chmod(0o755)
        (folder / "kubectl").unlink(missing_ok=True)
        (folder / "kubectl").symlink_to(self.cluster.binaries["kubectl"])
        environment = {**self.cluster.environment, "PATH": f"{folder}:{os.environ['PATH']}"}
        done = subprocess.run(
            inside(self.cluster.head.pid, ["kubectl", "fastserve", *words, "-n", NAMESPACE]),
            env=environment,
            cwd=self.cluster.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
        assert done.returncode == 0, f"kubectl fastserve {' '.join(words)}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def model(self, name: str) -> dict[str, Any]:
        """A Model, decoded."""
        found: dict[str, Any] = self.cluster.get(f"/apis/fastserve.dev/v1alpha1/namespaces/{NAMESPACE}/models/{name}")
        return found

    def is_ready(self, name: str) -> bool:
        """Whether a Model is Ready as its manifest stands now."""
        found = self.model(name)
        for condition in (found.get("status") or {}).get("conditions") or ():
            if condition["type"] == "Ready":
                is_of_now = condition.get("observedGeneration") == found["metadata"]["generation"]
                return bool(condition["status"] == "True" and is_of_now)
        return False

    def until_ready(self, name: str, seconds: float = 600) -> None:
        """Wait for a Model; when it does not become ready, tell what it says."""
        try:
            self.cluster.until(lambda: self.is_ready(name), f"{name} is Ready", seconds)
        except AssertionError as error:
            said = yaml.safe_dump(self.model(name).get("status"))
            raise AssertionError(f"{error}\n{said}\n{self.logs()}") from error

    def logs(self) -> str:
        """The end of what each of our pods says."""
        found = []
        for pod in self.pods():
            name = pod["metadata"]["name"]
            said = self.kubectl("logs", name, "--all-containers", "--tail=15", "--prefix", check=False)
            found.append(f"--- {name}\n{said}")
        return "\n".join(found)

    def pods(self, component: str | None = None) -> list[dict[str, Any]]:
        """Pods of the release, or of one part of it."""
        found = self.cluster.items(f"/api/v1/namespaces/{NAMESPACE}/pods")
        label = "app.kubernetes.io/component"
        return [pod for pod in found if component is None or pod["metadata"]["labels"].get(label) == component]

    def running(self, component: str) -> list[str]:
        """Names of a part's pods that are ready and stay."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods(component)
            if "deletionTimestamp" not in pod["metadata"]
            and any((c["type"], c["status"]) == ("Ready", "True") for c in pod["status"].get("conditions") or ())
        ]

    def service_url(self) -> str:
        """The gateway's Service by its address."""
        found = self.cluster.get(f"/api/v1/namespaces/{NAMESPACE}/services/fastserve-gateway")
        return f"http://{found['spec']['clusterIP']}:8100"

    def ask(self, model: str, **more: Any) -> httpx.Response:
        """One chat completion through the gateway's Service."""
        url = self.service_url()
        return self.cluster.inside(lambda: _ask(url, self.key, model, **more))

    def stream(self, model: str, begun: threading.Event, **more: Any) -> list[dict[str, Any]]:
        """The events of a streamed chat completion, `[DONE]` left out; `begun` is set at the first one."""
        url = self.service_url()
        return self.cluster.inside(lambda: _stream(url, self.key, model, begun, **more))

    def make_key(self, name: str, *models: str) -> None:
        """An AccessKey of these models for all that follows."""
        self.cluster.apply(
            {
                "apiVersion": "fastserve.dev/v1alpha1",
                "kind": "AccessKey",
                "metadata": {"name": name, "namespace": NAMESPACE},
                "spec": {"models": [*models]},
            }
        )
        secret = f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}-key"
        self.cluster.until(lambda: self.cluster.api.get(secret).status_code == 200, "the key is made")
        self.key = base64.b64decode(self.cluster.get(secret)["data"]["key"]).decode()


@dataclass
class Crowd:
    """Somebody who asks without a pause, and remembers what was not answered."""

    answered: int = 0
    lost: list[str] = field(default_factory=list)

    @contextmanager
    def asking(self, installation: Installation, model: str) -> Iterator[Crowd]:
        """Ask while the block lasts."""
        stop = threading.Event()
        url = installation.service_url()

        def ask() -> None:
            while not stop.wait(0.1):
                try:
                    answer = _ask(url, installation.key, model)
                except httpx.HTTPError as error:
                    self.lost.append(repr(error))
                    continue
                self.answered += answer.status_code == 200
                if answer.status_code != 200:
                    self.lost.append(f"{answer.status_code}: {answer.text[:200]}")

        thread = threading.Thread(target=lambda: installation.cluster.inside(ask))
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join(ASK_SECONDS)

    def until_answered(self, installation: Installation, more: int = 3) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + more
        installation.cluster.until(lambda: self.answered >= wanted or bool(self.lost), "requests are answered")


def _ask(url: str, key: str, model: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", timeout=ASK_SECONDS, **_request(key, model, **more))


def _stream(url: str, key: str, model: str, begun: threading.Event, **more: Any) -> list[dict[str, Any]]:
    request = _request(key, model, stream=True, **more)
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", timeout=ASK_SECONDS, **request) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                begun.set()
    return events


def _request(key: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}], **more}
    return {"json": body, "headers": {"Authorization": f"Bearer {key}"}}


def claim(name: str, path: Path, mode: str) -> list[dict[str, Any]]:
    """A folder of this machine as a claim: Pod Security's strictest level lets pods mount nothing else of a node."""
    spec = {"accessModes": [mode], "storageClassName": ""}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                **spec,
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": str(path)},
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"namespace": NAMESPACE, "name": name},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {**spec, "volumeName": name, "resources": {"requests": {"storage": "1Gi"}}},
        },
    ]


def make_inputs(folder: Path) -> Path:
    """The store's folder, with a tiny model and rows in it; it belongs to who runs in the pods."""
    folder.mkdir()
    tiny.tiny_manifest(folder / "inputs")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    return folder


def values(images: Sequence[Image]) -> dict[str, Any]:
    """The chart's values for two cores, and for Python packages that lie on this machine."""
    small = {"resources": {"requests": {"cpu": "10m", "memory": "64Mi"}}}
    by_digest = {image.repository: {"repository": image.repository, "digest": image.digest} for image in images}
    return {
        "image": {**by_digest["docker.io/library/fastserve"], "pullPolicy": "Never"},
        "store": {"claimName": "store"},
        "operator": {**small},
        # Beside the control plane, on the node that no test takes away: who loses a gateway loses the connection to it.
        "gateway": {**small, "terminationGracePeriodSeconds": 20, "nodeSelector": FIRST_NODE},
        "ray": {
            "image": by_digest["docker.io/library/fastserve-ray"],
            "head": {
                "resources": {"requests": {"cpu": "10m", "memory": "1Gi"}, "limits": {"memory": "6Gi"}},
                "nodeSelector": FIRST_NODE,
            },
            "autoscaler": small,
            "objectStoreBytes": 100_000_000,
            "profiles": [{"name": "local", "cpus": 1, "memory": "6Gi", "min": 0, "max": 2}],
            "extraVolumes": [{"name": "packages", "persistentVolumeClaim": {"claimName": "packages"}}],
            "extraVolumeMounts": [{"name": "packages", "mountPath": SITE_PACKAGES, "readOnly": True}],
        },
    }


def prepare(cluster: WholeCluster, store: Path) -> None:
    """The namespace, where only what Pod Security calls restricted may run, and its claims."""
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": levels}}
    cluster.apply(namespace, *claim("store", store, "ReadWriteMany"), *claim("packages", SITE, "ReadOnlyMany"))


def install(cluster: WholeCluster, images: Sequence[Image]) -> str:
    """`helm install`. Returns what it says."""
    file = cluster.folder / "values.yaml"
    file.write_text(yaml.safe_dump(values(images)))
    done = cluster.run(
        *(cluster.binaries["helm"], "install", "fastserve", str(CHART), "-n", NAMESPACE, "-f", str(file))
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@contextmanager
def installed(cluster: WholeCluster, images: Sequence[Image], *models: str) -> Iterator[Installation]:
    """The chart installed from these images, with a key of these models."""
    store = make_inputs(cluster.folder / "store")
    for image in images:
        cluster.bring(image.archive)
    prepare(cluster, store)
    install(cluster, images)
    made = Installation(cluster, store / "inputs")
    made.make_key("team", *models)
    yield made
