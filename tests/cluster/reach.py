"""Who gets through to whom: connections that are begun in the networks of real pods.

A connection that is refused got through: only silence means that a policy held it back. So a door needs nobody who
listens behind it.
"""

from __future__ import annotations

import contextlib
import errno
import re
import selectors
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from component import PAUSE
from network import API_ADDRESS, DNS_ADDRESS, call_in
from whole_cluster import WholeCluster

PAGE = Path(__file__).parents[2] / "docs/concepts/network.md"
OUTSIDE = "outside"
DNS = 53

SILENT_SECONDS = 4.0
"""So long nothing comes back through a closed door; its first two packets are lost by then."""

ANSWER_SECONDS = 60.0
"""By then an open door has answered, also one whose first packets were lost."""

Door = tuple[str, int]
"""Address and port."""

TRIED = {
    OUTSIDE: {DNS, 443, 6443, 9000},
    "operator": {8080},
    "gateway": {8100, 8101},
    "ray": {6379, 8000, 8265, 10001},
}
"""By part, what is tried beside the ports on which a pod listens."""

API_SERVER = "the API server"
AT_ONCE = 6
"""So many pods ask at a time: each opens a socket a door."""

LISTENS = "0A"
"""State of a socket that listens, in the kernel's tables."""


@dataclass(frozen=True)
class Spot:
    """A pod in the network. role: one of the page's words."""

    role: str
    name: str
    address: str
    network: Path

    def open_ports(self) -> set[int]:
        """TCP ports on which it listens for others."""
        return call_in(self.network, _listening)

    def answers(self, doors: Iterable[Door], wanted: set[Door]) -> set[Door]:
        """Doors from which something comes back; waits long for the wanted ones, and a while for the others."""
        return call_in(self.network, lambda: _answering({*doors}, wanted))


def the_page() -> dict[tuple[str, str], set[int] | None]:
    """Ports that the page opens from one part to another; None is all."""
    rows = re.findall(r"^\| `([a-z]+)` \| `([a-z]+)` \| ([0-9 ]+|all) \|", PAGE.read_text(), re.MULTILINE)
    return {(source, to): None if said == "all" else {int(port) for port in said.split()} for source, to, said in rows}


def spots(cluster: WholeCluster) -> list[Spot]:
    """All pods that run, are to stay, and have a network of their own."""
    by_address = dict(_networks(cluster))
    found = []
    for pod in cluster.items("/api/v1/pods"):
        metadata, address = pod["metadata"], pod["status"].get("podIP")
        stays = pod["status"]["phase"] == "Running" and "deletionTimestamp" not in metadata
        if stays and address in by_address and not pod["spec"].get("hostNetwork"):
            name = f"{metadata['namespace']}/{metadata['name']}"
            found.append(Spot(_role(metadata.get("labels") or {}), name, address, by_address[address]))
    return found


def wrong(cluster: WholeCluster) -> list[str]:
    """Where what gets through differs from the page, tried from each pod to each other one and to the API server.

    Pods that end meanwhile say nothing.
    """
    page, doors = the_page(), {}
    for spot in spots(cluster):
        with contextlib.suppress(OSError):
            doors[spot] = {(spot.address, port) for port in spot.open_ports() | TRIED.get(spot.role, set())}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        tried = [threads.submit(_wrong_from, spot, doors, page) for spot in doors]
        found = [one for each in tried for one in each.result()]
    stayed = {API_SERVER, *(spot.name for spot in spots(cluster))}
    return [f"{source} {does} {target}" for source, does, target in found if {source, target} <= stayed]


def _wrong_from(
    source: Spot, doors: Mapping[Spot, set[Door]], page: Mapping[tuple[str, str], set[int] | None]
) -> list[tuple[str, str, str]]:
    """Name of the pod, what is wrong, and name of whom it tried."""
    api = (API_ADDRESS, 443)
    named = {door: target.name for target, there in doors.items() for door in there if target != source}
    roles = {door: target.role for target, there in doors.items() for door in there}
    named[api], roles[api] = API_SERVER, OUTSIDE
    wanted = {door for door in named if _is_open(source.role, roles[door], door[1], page)}
    try:
        answered = source.answers(named, wanted)
    except OSError as error:
        return [(source.name, f"cannot ask ({error})", source.name)]
    closed = [(source.name, f"has no way to port {door[1]} of", named[door]) for door in sorted(wanted - answered)]
    return closed + [
        (source.name, f"has a way to port {door[1]} of", named[door]) for door in sorted(answered - wanted)
    ]


def _is_open(source: str, target: str, port: int, page: Mapping[tuple[str, str], set[int] | None]) -> bool:
    if source == target == OUTSIDE:
        return True
    if target == OUTSIDE and port == DNS:
        return True
    opened = page.get((source, target), set())
    return opened is None or port in opened


def stranger(namespace: str, node: str) -> dict[str, Any]:
    """A pod that has nothing to do with FastServe; it keeps to what Pod Security calls restricted."""
    container = {
        "name": "stranger",
        "image": PAUSE,
        "imagePullPolicy": "Never",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "nodeName": node,
        "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
    }
    metadata = {"name": f"stranger-{node}", "namespace": namespace, "labels": {"app": "stranger"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _role(labels: Mapping[str, str]) -> str:
    if labels.get("app.kubernetes.io/part-of") != "fastserve":
        return OUTSIDE
    part = labels["app.kubernetes.io/component"]
    return "ray" if part in ("ray-head", "ray-worker") else part


def _networks(cluster: WholeCluster) -> Iterator[tuple[str, Path]]:
    """Address and handle of each pod's network; the folder of handles is the node's own."""
    for node in cluster.nodes.values():
        for handle in Path("/proc", str(node.pid), "root", "run", "netns").iterdir():
            with contextlib.suppress(OSError):  # of a pod that begins or ends just now
                yield call_in(handle, _own_address), handle


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((DNS_ADDRESS, DNS))  # sends nothing
        return str(asking.getsockname()[0])


def _listening() -> set[int]:
    found = set()
    for table, loopback in (("tcp", "0100007F"), ("tcp6", f"{'0' * 24}01000000")):
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.partition(":")
            if state == LISTENS and address != loopback:
                found.add(int(port, 16))
    return found


def _answering(doors: set[Door], wanted: set[Door]) -> set[Door]:
    answered = set()
    begun = time.monotonic()
    with selectors.DefaultSelector() as waiting:
        for door in doors:
            asking = socket.socket()
            asking.setblocking(False)
            waiting.register(asking, selectors.EVENT_WRITE, door)
            if asking.connect_ex(door) not in (0, errno.EINPROGRESS, errno.ECONNREFUSED):
                raise OSError(f"{door} cannot be asked")
        try:
            while waiting.get_map():
                spent = time.monotonic() - begun
                if spent > ANSWER_SECONDS or (spent > SILENT_SECONDS and wanted <= answered):
                    break
                for key, _ in waiting.select(0.2):
                    waiting.unregister(key.fileobj)
                    asking = key.fileobj  # type: ignore[assignment]
                    error = asking.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    asking.close()
                    if error in (0, errno.ECONNREFUSED):
                        answered.add(key.data)
        finally:
            for key in [*waiting.get_map().values()]:
                key.fileobj.close()  # type: ignore[union-attr]
    return answered
