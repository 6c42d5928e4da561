"""A Kubernetes without machines: etcd, API server and controller manager on loopback, and kubectl beside them.

Nothing is a stand-in but the machines: there is no kubelet, so pods stay Pending. Certificates, data, logs and
kubectl's cache are in one folder that goes away with the control plane; the processes end with the test run, even when
it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from certificates import Subject, kubeconfig, write_certificates
from kubernetes_binaries import Binaries

from fastserve.cluster.processes import free_ports

SERVICE_RANGE = "10.96.0.0/16"
SUBJECTS = {
    "server": Subject("kube-apiserver", addresses=("127.0.0.1",), names=("localhost",)),
    "admin": Subject("admin", "system:masters"),
    "controllers": Subject("system:kube-controller-manager"),
}
START_LIMIT_SECONDS = 120
STOP_LIMIT_SECONDS = 60


class NotStarted(RuntimeError):
    """A part did not come up; the message holds the end of its log."""


@dataclass
class Cluster:
    """A cluster as its administrator sees it."""

    folder: Path
    """Folder of its own, short enough for a socket's path."""

    kubeconfig: Path
    kubectl_path: str
    api: httpx.Client = field(init=False)
    """HTTP to the API server as administrator: `cluster.api.get("/version")`."""

    def kubectl(self, *words: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl; `text` is its standard input. Raises with what it said when it fails and `check` is set."""
        done = subprocess.run(
            [self.kubectl_path, *words], env=self.environment, input=text, capture_output=True, text=True, timeout=400
        )
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(words)}: {done.stderr.strip()}")
        return done

    @property
    def environment(self) -> dict[str, str]:
        """For programs that read a kubeconfig; whatever they cache is in the folder."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), "KUBECONFIG": str(self.kubeconfig)}

    def get(self, path: str) -> Any:
        """An object of the API, decoded."""
        answer = self.api.get(path)
        answer.raise_for_status()
        return answer.json()

    def as_account(self, namespace: str, account: str) -> Path:
        """A kubeconfig of a ServiceAccount, with a token of an hour: a program runs with its rights and no others."""
        token = self.kubectl("create", "token", account, "-n", namespace, "--duration=1h").stdout.strip()
        shown = json.loads(self.kubectl("config", "view", "--minify", "--raw", "--flatten", "-o", "json").stdout)
        shown["users"] = [{"name": shown["users"][0]["name"], "user": {"token": token}}]
        place = self.folder / f"{namespace}-{account}.conf"
        place.write_text(json.dumps(shown))
        return place

    def established(self, *definitions: str) -> None:
        """Wait until the API server serves what these CustomResourceDefinitions define (kubectl wait stumbles over
        one that has no status yet)."""
        end = time.monotonic() + START_LIMIT_SECONDS
        for name in definitions:
            while not self._is_established(name):
                if time.monotonic() > end:
                    raise NotStarted(f"the definition {name} is not served")
                time.sleep(0.05)

    def _is_established(self, name: str) -> bool:
        found = self.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
        conditions = found.get("status", {}).get("conditions") or []
        return any((item["type"], item["status"]) == ("Established", "True") for item in conditions)

    @contextlib.contextmanager
    def a_namespace(self) -> Iterator[str]:
        """A namespace that goes with the block; its objects go with it, finalizers permitting."""
        name = f"t-{uuid.uuid4().hex[:10]}"
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        self.api.post("/api/v1/namespaces", json=body).raise_for_status()
        try:
            yield name
        finally:
            with contextlib.suppress(httpx.HTTPError):  # the API server itself may be gone, and the namespace with it
                self.api.delete(f"/api/v1/namespaces/{name}")

    @contextlib.contextmanager
    def _proxied(self) -> Iterator[Cluster]:
        """With `api`: kubectl's own proxy on a socket, which knows every way to sign in that a kubeconfig has."""
        place = self.folder / "api.sock"
        words = [self.kubectl_path, "proxy", f"--unix-socket={place}"]
        with _process("kubectl-proxy", words, self.folder, self.environment) as proxy:
            _wait(lambda: place.exists(), proxy, self.folder / "kubectl-proxy.log")
            transport = httpx.HTTPTransport(uds=str(place))
            with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as self.api:
                yield self


@dataclass
class ControlPlane(Cluster):
    """A cluster of our own. `stop_api` and `start_api` take the API server away and bring it back with its data."""

    binaries: Binaries = field(default_factory=lambda: Binaries({}))
    ports: dict[str, int] = field(default_factory=dict)
    _parts: dict[str, tuple[contextlib.ExitStack, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def start_api(self) -> None:
        """Returns when it answers."""
        self._start("kube-apiserver", self._api_server(), f"https://127.0.0.1:{self.ports['api']}/readyz")

    def stop_api(self) -> None:
        """Nobody can reach the API until `start_api`. It is killed: a graceful end waits for whoever watches."""
        stack, process = self._parts.pop("kube-apiserver")
        process.kill()
        stack.close()

    def _start(self, name: str, words: list[str], ready_url: str | None = None) -> None:
        stack = contextlib.ExitStack()
        with stack:
            process = stack.enter_context(_process(name, words, self.folder, self.environment))
            if ready_url is not None:
                tls = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
                tls.load_cert_chain(self.folder / "admin.crt", self.folder / "admin.key")
                with httpx.Client(verify=tls, timeout=30) as client:
                    _wait(lambda: _answers(client, ready_url), process, self.folder / f"{name}.log")
            self._parts[name] = stack.pop_all(), process

    def _etcd(self) -> list[str]:
        client, peer = (f"http://127.0.0.1:{self.ports[name]}" for name in ("etcd", "peer"))
        return [
            *(self.binaries["etcd"], "--name=e", f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync"),
            *("--log-level=warn", f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=e={peer}"),
        ]

    def _api_server(self) -> list[str]:
        files = self.folder
        return [
            *(self.binaries["kube-apiserver"], f"--etcd-servers=http://127.0.0.1:{self.ports['etcd']}"),
            *("--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={self.ports['api']}"),
            *(f"--service-cluster-ip-range={SERVICE_RANGE}", "--endpoint-reconciler-type=none", "--profiling=false"),
            *(f"--tls-cert-file={files}/server.crt", f"--tls-private-key-file={files}/server.key"),
            *(f"--client-ca-file={files}/ca.crt", f"--service-account-key-file={files}/accounts.pub"),
            *(f"--service-account-signing-key-file={files}/accounts.key", "--service-account-issuer=https://fastserve"),
            *("--authorization-mode=Node,RBAC", "--enable-priority-and-fairness=false", "--allow-privileged=true"),
        ]

    def _controllers(self) -> list[str]:
        files = self.folder
        return [
            *(self.binaries["kube-controller-manager"], f"--kubeconfig={files}/controllers.conf"),
            *("--leader-elect=false", "--bind-address=127.0.0.1", f"--secure-port={self.ports['controllers']}"),
            *(f"--service-account-private-key-file={files}/accounts.key", f"--root-ca-file={files}/ca.crt"),
            *("--use-service-account-credentials=true", "--profiling=false"),
        ]

    def start(self) -> None:
        """Start all three; the controllers are at work a moment later."""
        self.ports = dict(zip(("etcd", "peer", "api", "controllers"), free_ports(4), strict=True))
        write_certificates(self.folder, SUBJECTS)
        server = f"https://127.0.0.1:{self.ports['api']}"
        for user in ("admin", "controllers"):
            (self.folder / f"{user}.conf").write_text(json.dumps(kubeconfig(self.folder, user, server)))
        self._start("etcd", self._etcd())
        self.start_api()
        self._start("kube-controller-manager", self._controllers())

    def stop(self) -> None:
        """End all. They are killed: nothing of theirs is kept, and a graceful end takes 20 s."""
        for stack, process in self._parts.values():
            process.kill()
            stack.close()
        self._parts.clear()


@contextlib.contextmanager
def control_plane(binaries: Binaries) -> Iterator[ControlPlane]:
    """A control plane of our own, about 4 s after the call; it ends with the block and leaves nothing."""
    folder = Path(tempfile.mkdtemp(prefix="fs-kube-"))
    plane = ControlPlane(folder, folder / "admin.conf", binaries["kubectl"], binaries)
    try:
        plane.start()
        with plane._proxied():
            yield plane
    finally:
        plane.stop()
        shutil.rmtree(folder)


@contextlib.contextmanager
def existing_cluster(kubeconfig: Path, kubectl: str) -> Iterator[Cluster]:
    """Somebody's cluster: what is made in it must be taken away by who makes it."""
    with (
        tempfile.TemporaryDirectory(prefix="fs-kube-") as folder,
        Cluster(Path(folder), kubeconfig.resolve(), kubectl)._proxied() as cluster,
    ):
        yield cluster


@contextlib.contextmanager
def _process(
    name: str, words: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that ends with the block, or with this process if that is killed."""
    with open(folder / f"{name}.log", "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-ISc", _END_WITH_PARENT, *words],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


_END_WITH_PARENT = (
    "import ctypes, os, signal, sys;"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL);"  # PR_SET_PDEATHSIG
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _wait(ready: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_LIMIT_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise NotStarted(f"{log.stem} did not come up: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)
