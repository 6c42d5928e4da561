"""The main job: how long a new user waits, how long the next time, and what it keeps in memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tests.bench import gateway
from tests.bench.figure import Figure

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deployments" / "01-quickstart.yaml"
COMMAND = [str(Path(sys.executable).parent / "fastserve")]


def run() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as folder:
        home = ["--home", folder]
        yield _timed("validate", ["validate", str(MANIFEST)], 1.0)
        yield _timed("plan, first look", ["plan", str(MANIFEST), *home], 2.0)
        yield _timed("plan, again", ["plan", str(MANIFEST), *home], 2.0)
        try:
            yield _timed(
                "quickstart, empty store to the first answer", ["up", str(MANIFEST), "--detach", *home], 600.0, 1
            )
            _fastserve(["down", *home])
            yield _timed("quickstart unchanged, to the answer", ["up", str(MANIFEST), "--detach", *home], 60.0, 1)
            yield from _memory(Path(folder))
        finally:
            _fastserve(["down", *home])
    yield from gateway.run()


def _timed(name: str, arguments: list[str], aim_seconds: float, times: int = 3) -> Figure:
    """Wall seconds, the best of `times` runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        _fastserve(arguments)
        taken.append(time.perf_counter() - began)
    return Figure(name, min(taken), "s", f"< {aim_seconds:g}", min(taken) < aim_seconds)


def _fastserve(arguments: list[str]) -> None:
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def _memory(home: Path) -> Iterator[Figure]:
    """Proportional set size of what serves, by role: shared pages are counted once."""
    from fastserve.cluster.home import Home

    mark = f"FASTSERVE_HOME_ID={Home(home).id}".encode()
    sizes: dict[str, float] = {}
    for process in psutil.process_iter():
        try:
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0") and process.pid != os.getpid():
                role = _role(" ".join(process.cmdline()))
                sizes[role] = sizes.get(role, 0) + process.memory_full_info().pss / 1e6
        except (psutil.Error, OSError):
            continue
    for role, megabytes in sorted(sizes.items()):
        yield Figure(f"memory, {role}", megabytes, "MB", "-", None)


def _role(command: str) -> str:
    for sign, role in (
        ("fastserve.gateway", "gateway"),
        ("fastserve.cluster.tender", "tender"),
        ("ServeReplica", "engine replica"),
        ("EngineCore", "engine core"),
        ("VLLM", "engine core"),
        ("ray::ProxyActor", "Serve proxy"),
        ("ServeController", "Serve controller"),
    ):
        if sign in command:
            return role
    return "Ray head"
