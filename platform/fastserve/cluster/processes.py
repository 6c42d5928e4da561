"""Which processes belong to a home, and how they are ended, so that nothing is ever left behind or hit by mistake.

Every process of a home is started with FASTSERVE_HOME_ID in its environment, and its children inherit it. So they are
found again after any crash, by the kernel's own account of each process's first environment (`/proc/PID/environ`),
without lists of numbers that may have been handed to someone else since.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fastserve.errors import ClusterFailed, PortInUse
from fastserve.plan.environment import passed, service_links

HOME_VARIABLE = "FASTSERVE_HOME_ID"
"""Carries the home's id (`Home.id`) in every process of that home."""

PART_VARIABLE = "FASTSERVE_PART"
"""Carries which part of the home's machinery a process belongs to: `ray`, `gateway`."""

LOOPBACK = "127.0.0.1"

_KEPT_NAMES = """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TERM TMPDIR VIRTUAL_ENV LD_LIBRARY_PATH CUDA_VISIBLE_DEVICES CUDA_HOME
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE HTTP_PROXY HTTPS_PROXY http_proxy https_proxy
    OPENBLAS_CORETYPE OMP_NUM_THREADS
"""
_KEPT = frozenset(_KEPT_NAMES.split())
_KEPT_FAMILIES = ("LC_", "XDG_", "AWS_", "HF_", "NVIDIA_", "FASTSERVE_")

# Below the range from which the kernel takes ports for outgoing connections (32768 and above), so that a port found
# free here is not taken by a passing connection before its server binds it.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000


@dataclass(frozen=True, slots=True)
class Process:
    """One process, told apart from a later one with the same number by its start time."""

    pid: int
    start_ticks: int
    """Clock ticks after boot at which it started, field 22 of /proc/PID/stat."""

    def to_json(self) -> dict[str, int]:
        """Plain values."""
        return {"pid": self.pid, "start_ticks": self.start_ticks}

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now; None when there is none or it is a zombie."""
        stat = _stat(pid)
        return None if stat is None else cls(pid, stat.start_ticks)

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return Process.of(self.pid) == self

    @property
    def command(self) -> str:
        """Its command line, for messages."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
    return None if fields[0] in "ZX" else _Stat(parent=int(fields[1]), start_ticks=int(fields[19]))


def environment(pid: int) -> dict[str, str] | None:
    """The environment a process was started with; None when it is gone or belongs to somebody else."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if b"=" in item)
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs}


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process of ours: built from what it needs, not inherited, and `extra` on top.

    What a shell or a cluster happens to carry (VLLM_PORT=tcp://10.0.0.1:80 of a Service named vllm, RAY_ADDRESS of
    another Ray, PYTHONDONTWRITEBYTECODE) changes how Ray and vLLM start, so none of it goes in. Credentials of stores
    and hubs do, and what FASTSERVE_ENGINE_VARIABLES names.
    """
    kept_names = _KEPT | passed(os.environ)
    links = service_links(os.environ)
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name in kept_names or name.startswith(_KEPT_FAMILIES)) and name not in links
    }
    local = f"{LOOPBACK},localhost"
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, (os.environ.get(name), local)))
    kept["PATH"] = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), kept.get("PATH", os.defpath))))
    kept["PYTHONPATH"] = os.pathsep.join(_roots())
    return kept | dict(extra)


def _roots() -> list[str]:
    """Where this very FastServe was imported from, and what the user's own PYTHONPATH adds."""
    own = str(Path(__file__).resolve().parents[2])
    inherited = (part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part)
    return list(dict.fromkeys([own, *inherited]))


def find(home_id: str, part: str | None = None) -> list[Process]:
    """Processes of a home (of one part of it), but never this one nor one that it descends from."""
    own = _lineage()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) in own:
            continue
        process = Process.of(int(entry.name))
        variables = environment(int(entry.name)) if process else None
        if process is None or not variables or variables.get(HOME_VARIABLE) != home_id:
            continue
        if part is None or variables.get(PART_VARIABLE) == part:
            found.append(process)
    return found


def _lineage() -> set[int]:
    """This process and all it descends from."""
    pids, pid = set(), os.getpid()
    while pid > 0 and pid not in pids:
        pids.add(pid)
        stat = _stat(pid)
        pid = stat.parent if stat else 0
    return pids


def kill_home(
    home_id: str,
    part: str | None = None,
    grace_seconds: float = 8.0,
    deadline_seconds: float = 30.0,
    idle: Sequence[str] = (),
) -> int:
    """End all processes of a home: ask, wait `grace_seconds`, then kill, until none is found.

    idle: words in the command lines of processes that have nothing to tidy up: nobody waits for them alone.
    Returns how many there were. Raises ClusterFailed when some are still there after `deadline_seconds`: they hang in
    the kernel, usually on a disk or network file system that does not answer.
    """
    began = time.monotonic()
    ended: set[Process] = set()
    send = signal.SIGTERM
    while processes := find(home_id, part):
        if time.monotonic() - began > deadline_seconds:
            listed = ", ".join(f"{process.pid} ({process.command[:60]})" for process in processes)
            raise ClusterFailed(f"these processes do not end: {listed}; end them by hand, then run the command again")
        ended.update(processes)
        needless = {process for process in processes if any(word in process.command for word in idle)}
        end_each(processes, send, grace_seconds if send == signal.SIGTERM else 2.0, needless)
        send = signal.SIGKILL  # whatever is found in a second look is new or would not listen
    return len(ended)


def end_each(
    processes: Iterable[Process],
    with_signal: signal.Signals,
    wait_seconds: float,
    needless: Container[Process] = (),
) -> None:
    """Send each of these very processes a signal and wait until all are gone, at most `wait_seconds`.

    needless: those that need not be gone while others of them were waited for.
    """
    handles: dict[int, Process] = {}
    try:
        for process in processes:
            handle = _open(process)
            if handle is not None:
                handles[handle] = process
                _send(handle, with_signal)
        needed = {handle for handle, process in handles.items() if process not in needless}
        _await_ends(needed or set(handles), wait_seconds)
    finally:
        for handle in handles:
            os.close(handle)


def _open(process: Process) -> int | None:
    """A handle on this very process: what is sent to it cannot reach a later one with the same number."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return None
    if not process.alive:
        os.close(handle)
        return None
    return handle


def _send(handle: int, with_signal: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(handle, with_signal)
    except ProcessLookupError:
        return


def _await_ends(handles: Set[int], wait_seconds: float) -> None:
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    left, deadline = set(handles), time.monotonic() + wait_seconds
    while left and (remaining := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(remaining * 1000):
            poll.unregister(handle)
            left.discard(handle)


def await_true(check: Callable[[], bool], seconds: float, every_seconds: float = 0.2) -> bool:
    """Look every `every_seconds` until `check` holds; False when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every_seconds)
    return True


def free_port(preferred: int | None = None, avoid: Iterable[int] = ()) -> int:
    """A port on loopback that nobody listens on: `preferred` if it is free, else one drawn by chance.

    Raises PortInUse when none of many is free.
    """
    taken = set(avoid)
    if preferred is not None and preferred not in taken and port_is_free(preferred):
        return preferred
    for _ in range(200):
        port = random.randrange(_FIRST_PORT, _LAST_PORT)
        if port not in taken and port_is_free(port):
            return port
    raise PortInUse(f"no free port between {_FIRST_PORT} and {_LAST_PORT} on {LOOPBACK}; stop what listens there")


def free_ports(count: int) -> list[int]:
    """Different free ports."""
    ports: list[int] = []
    for _ in range(count):
        ports.append(free_port(avoid=ports))
    return ports


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
