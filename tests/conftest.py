"""What all tests share: tiers that run when they are asked for, and tools that CI must have."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline for an example: a machine that is busy, or stands still for a while, makes nothing wrong.
_usual = settings.get_profile("ci" if os.environ.get("CI") == "true" else "default")
settings.register_profile("patient", _usual, deadline=None)
settings.load_profile("patient")

TIERS = ("ray", "e2e", "s3", "kube", "cluster")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tiers that take longer, unless `-m` says what to run."""
    if config.option.markexpr:
        return
    slow = [item for item in items if any(item.get_closest_marker(tier) for tier in TIERS)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed or logged is sent from the process that ran it to the one that tells: as UTF-8, which has
    no lone surrogates."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def missing() -> Callable[[str], None]:
    """`missing("needs root")` skips the test, but fails it in CI: there nothing may be missing."""

    def say(reason: str) -> None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI {reason}", pytrace=False)
        pytest.skip(reason)

    return say


@pytest.fixture(scope="session")
def require(missing: Callable[[str], None]) -> Callable[[str], str]:
    """`require("go")` gives the tool's path; without it the test cannot run."""

    def find(tool: str) -> str:
        path = shutil.which(tool)
        if path is None:
            missing(f"needs the tool '{tool}', which is not on the PATH")
        return str(path)

    return find


@pytest.fixture(scope="session")
def open_to_the_network() -> Callable[[Iterable[int]], list[str]]:
    """`open_to_the_network(pids)`: where these processes listen beyond loopback, from the kernel's own tables."""

    def look(pids: Iterable[int]) -> list[str]:
        sockets = {**_listening("tcp", socket.AF_INET), **_listening("tcp6", socket.AF_INET6)}
        assert sockets, "the kernel's tables can be read, and somebody listens"
        found = []
        for pid in pids:
            for handle in _handles(pid):
                address = sockets.get(handle)
                if address is not None and not _is_loopback(address):
                    found.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:60]!r}: {address}")
        return found

    return look


def _listening(table: str, family: socket.AddressFamily) -> dict[str, str]:
    """Address of every listening socket, by what its handle points to."""
    found = {}
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":  # TCP_LISTEN
            words = bytes.fromhex(fields[1].partition(":")[0])
            raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
            found[f"socket:[{fields[9]}]"] = socket.inet_ntop(family, raw)
    return found


def _handles(pid: int) -> list[str]:
    try:
        return [os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []  # it, or one of its files, has just gone


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback
