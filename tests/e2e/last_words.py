"""What a failed test shows of a home: who runs in it, and the end of what each of them wrote. Bounded, so that the
end of CI's output holds all of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.cluster.home import Home
from fastserve.cluster.processes import find

WATCHED: dict[str, Home] = {}
"""Homes that are in use, by the name of whoever uses them; also one whose end failed."""

LOG_BYTES = 8000
LINES = 12
LINE_CHARACTERS = 300
LOGS = 16
PROCESSES = 60

RAY_LOGS = (
    "serve/controller_*.log",
    "serve/replica_*.log",
    "serve/proxy_*.log",
    "job-driver-*.log",
    "worker-*.err",
    "gcs_server.out",
    "raylet.out",
    "dashboard.log",
)
"""Of a head's session; the newest two of each kind."""


def add_to(report: pytest.TestReport) -> None:
    """Put the last words of all homes in use into the report of a failed test."""
    if report.failed:
        report.sections += [(f"the home of {name}", last_words(home)) for name, home in WATCHED.items()]


def last_words(home: Home) -> str:
    """Processes and ends of logs. Whatever cannot be read is left out: this must not hide what failed."""
    return "\n".join([*_processes(home), *_logs(home)])


def _processes(home: Home) -> Iterator[str]:
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    yield f"at {time.strftime('%H:%M:%S')}, load {load}, processes of {home.path}:"
    for process in find(home.id)[:PROCESSES]:
        yield f"  {process.pid:>7} {_state(process.pid)} {process.command[:150]}"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "-"


def _logs(home: Home) -> Iterator[str]:
    own = [*_newest(home.path / "logs", "*", 6), *_newest(home.path.parent, "background.log", 1)]
    rays = Path("/tmp").glob(f"fastserve-{home.id[:8]}-*")
    sessions = [session for ray in rays for session in ray.glob("session_2*/logs")]
    theirs = [path for session in sessions for pattern in RAY_LOGS for path in _newest(session, pattern, 2)]
    warm = [path for ray in Path("/tmp").glob(f"fastserve-{home.id[:8]}-*") for path in _newest(ray, "*/warm-*.log", 2)]
    for path in [*theirs, *warm, *own][-LOGS:]:
        yield f"--- {path.parent.name}/{path.name}"
        yield _end(path)


def _newest(folder: Path, pattern: str, count: int) -> list[Path]:
    found = []
    for path in folder.glob(pattern):
        try:
            if path.is_file() and path.stat().st_size:
                found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    return [path for _, path in sorted(found)[-count:]]


def _end(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return f"({error})"
    return "\n".join(line[:LINE_CHARACTERS] for line in lines[-LINES:])
