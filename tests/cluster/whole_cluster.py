"""A whole Kubernetes on one machine: nodes with kubelets and containers, names for Services, KubeRay's operator."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import addons
import yaml
from certificates import Subject, kubeconfig, write_certificates
from component import API_PORT
from control_plane import Cluster
from kubernetes_binaries import Binaries, kuberay
from network import API_ADDRESS, Place, call_inside, first, inside, join, part
from node import Node, folder_of_a_cluster

NODES = 4
"""Most nodes of a cluster: so many have certificates."""

SERVICE_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")

T = TypeVar("T")


@dataclass
class WholeCluster(Cluster):
    """A cluster with nodes. `kubectl` and `api` are `Cluster`'s; they work from outside the nodes' network."""

    binaries: Binaries = field(default_factory=lambda: Binaries({}))
    nodes: dict[str, Node] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    """Archives that every node has."""

    @property
    def head(self) -> Node:
        """The node with the control plane."""
        return self.nodes["node0"]

    def add_node(self, number: int) -> Node:
        """Start a node and let it join; returns when it is ready and has its images."""
        place = Place(number)
        node = Node(place, self.binaries, self.folder / place.name, self.folder)
        self.nodes[place.name] = node
        if number == 0:
            node.start(lambda pid: first(pid, place), _api_url(place))
            node.until(lambda: self._is_served(), "the API server answers")
        else:
            node.start(lambda pid: join(pid, place, self.head.pid, self.head.place), _api_url(self.head.place))
        node.until(lambda: node.socket.exists(), "containerd listens")
        for image in self.images:
            node.bring(image)
        node.until(lambda: self.is_ready(place.name), "the node is ready")
        return node

    def bring(self, image: Path) -> None:
        """Give an image to every node, also to those that join later."""
        self.images.append(image)
        for node in self.nodes.values():
            node.bring(image)

    def lose_node(self, number: int) -> None:
        """Pull a node's plug. The cluster finds out by itself."""
        node = self.nodes.pop(Place(number).name)
        node.stop()
        part(node.place, self.head.pid)

    def inside(self, function: Callable[[], T]) -> T:
        """Call a function in a thread whose sockets are those of the first node: Services answer there."""
        return call_inside(self.head.pid, function)

    def run(self, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a program in the first node's network, with the administrator's kubeconfig."""
        return subprocess.run(
            inside(self.head.pid, [*words]), env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def apply(self, *objects: dict[str, Any]) -> None:
        """Server-side apply."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=yaml.safe_dump_all(objects))

    def items(self, path: str) -> list[dict[str, Any]]:
        """Objects of a list of the API."""
        found: list[dict[str, Any]] = self.get(path)["items"]
        return found

    def is_ready(self, name: str) -> bool:
        """Whether a node is ready."""
        done = self.kubectl("get", "node", name, "-o", "json", check=False)
        if done.returncode:
            return False
        conditions = json.loads(done.stdout)["status"].get("conditions") or []
        return any((item["type"], item["status"]) == ("Ready", "True") for item in conditions)

    def until(self, true: Callable[[], bool], what: str, seconds: float = 600) -> None:
        """Wait for something to become true; when it does not, tell how the pods stand."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"after {seconds:.0f} s not seen that {what}\n{self.story()}")
            time.sleep(0.2)

    def story(self) -> str:
        """Pods and late events of all namespaces."""
        pods = self.kubectl("get", "pods", "-A", "-o", "wide", check=False).stdout
        events = self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp", check=False).stdout.splitlines()
        return "\n".join([pods, *events[-25:]])

    def _is_served(self) -> bool:
        return self.kubectl("get", "serviceaccount", "default", check=False).returncode == 0

    def start(self, definitions: Path) -> None:
        """Start the first node and the addons. definitions: folder of KubeRay's."""
        write_certificates(self.folder, _subjects())
        server = _api_url(Place(0))
        for user in _subjects():
            (self.folder / f"{user}.conf").write_text(json.dumps(kubeconfig(self.folder, user, server)))
        self.images = addons.images(self.binaries, self.folder)
        self.add_node(0)
        self.apply(*addons.dns(), *addons.kuberay(definitions.parents[1] / "rbac"))
        for kind in ("rayclusters", "rayjobs", "rayservices"):
            # Too large for client-side apply.
            self.kubectl("apply", "--server-side", "-f", str(definitions / f"ray.io_{kind}.yaml"))
        for namespace, name in (("kube-system", "coredns"), (addons.KUBERAY_NAMESPACE, "kuberay-operator")):
            self.kubectl("wait", "--for=condition=Available", "-n", namespace, f"deployment/{name}", "--timeout=110s")

    def stop(self) -> None:
        """Stop all nodes, the first one last."""
        for node in reversed([*self.nodes.values()]):
            node.stop()


@contextlib.contextmanager
def whole_cluster(binaries: Binaries, go: str) -> Iterator[WholeCluster]:
    """A cluster of one node, ready for a chart; it ends with the block and leaves nothing."""
    with folder_of_a_cluster() as folder:
        script = folder / "kubectl"
        cluster = WholeCluster(folder, folder / "admin.conf", str(script), binaries)
        try:
            _write_kubectl(script, cluster)
            cluster.start(kuberay(go))
            with cluster._proxied():
                yield cluster
        finally:
            cluster.stop()


def _write_kubectl(script: Path, cluster: WholeCluster) -> None:
    """A kubectl that works from outside: it goes into the first node's network."""
    enter = 'exec nsenter --target $(cat {0}/node0/pid) --net {1} "$@"\n'
    script.write_text("#!/bin/sh\n" + enter.format(cluster.folder, cluster.binaries["kubectl"]))
    script.chmod(0o755)


def _api_url(place: Place) -> str:
    return f"https://{place.address}:{API_PORT}"


def _subjects() -> dict[str, Subject]:
    machines = {
        place.name: Subject(f"system:node:{place.name}", "system:nodes", (place.address,), (place.name,))
        for place in map(Place, range(NODES))
    }
    addresses = ("127.0.0.1", API_ADDRESS, Place(0).address)
    return {
        "server": Subject("kube-apiserver", None, addresses, ("localhost", *SERVICE_NAMES)),
        "admin": Subject("admin", "system:masters"),
        "controllers": Subject("system:kube-controller-manager"),
        "scheduler": Subject("system:kube-scheduler"),
        "proxy": Subject("system:kube-proxy"),
        "policies": Subject("policies", "system:masters"),
        "kubelets": Subject("apiserver-kubelet-client", "system:masters"),
        **machines,
    }
