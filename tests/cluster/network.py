"""The network of a cluster of nodes on one machine: each node has a network of its own, and none has an uplink.

The first node holds a bridge; every other node has a wire to it. The networks have no names: each lives as long as its
node's processes, and its wires go with it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SERVICES = "10.96.0.0/16"
PODS = "10.90.0.0/16"
API_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
BRIDGE = "nodes"
CLONE_NEWNET = 0x40000000

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a node is in the network, by its number."""

    number: int

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"10.89.0.{self.number + 1}"

    @property
    def pods(self) -> str:
        """Addresses of its pods."""
        return f"10.90.{self.number}.0/24"


def inside(pid: int, words: list[str]) -> list[str]:
    """The command that runs `words` in the network of a process."""
    return ["nsenter", "--target", str(pid), "--net", *words]


def call_in(network: Path, function: Callable[[], T]) -> T:
    """Call a function in a thread whose sockets are of a network, by the kernel's handle of it."""

    def call() -> T:
        handle = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(handle, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {network}")
        finally:
            os.close(handle)
        return function()

    with ThreadPoolExecutor(1) as thread:  # a thread stays where it went, so it is not used again
        return thread.submit(call).result()


def call_inside(pid: int, function: Callable[[], T]) -> T:
    """Call a function in a thread whose sockets are of the network of a process."""
    return call_in(Path(f"/proc/{pid}/ns/net"), function)


def first(pid: int, place: Place) -> None:
    """Lay the bridge, and what every node has. A stub of a wire gives the bridge a carrier."""
    _ip(pid, "link", "add", BRIDGE, "type", "bridge")
    _ip(pid, "link", "add", "stub0", "type", "veth", "peer", "name", "stub1")
    for name in ("stub0", "stub1"):
        _ip(pid, "link", "set", name, "up")
    _ip(pid, "link", "set", "stub0", "master", BRIDGE)
    _own(pid, place, BRIDGE)


def join(pid: int, place: Place, first_pid: int, first_place: Place) -> None:
    """Lay the wire from another node to the first one's bridge, and the routes of pods both ways."""
    wire = f"to-{place.name}"
    _ip(first_pid, "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    _ip(first_pid, "link", "set", wire, "master", BRIDGE, "up")
    _own(pid, place, "eth0")
    _ip(pid, "route", "replace", PODS, "via", first_place.address)
    _ip(first_pid, "route", "replace", place.pods, "via", place.address)


def part(place: Place, first_pid: int) -> None:
    """Forget a node that is gone."""
    _ip(first_pid, "route", "del", place.pods)


def _own(pid: int, place: Place, device: str) -> None:
    _ip(pid, "link", "set", "lo", "up")
    _ip(pid, "address", "replace", f"{place.address}/24", "dev", device)
    _ip(pid, "link", "set", device, "up")
    _ip(pid, "route", "replace", SERVICES, "dev", device)
    forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
    subprocess.run(inside(pid, ["sh", "-c", forward]), check=True, capture_output=True)


def _ip(pid: int, *words: str) -> None:
    done = subprocess.run(inside(pid, ["ip", *words]), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
