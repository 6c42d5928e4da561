"""A process that has imported vLLM and waits: most of an engine's start is imports, and one forked from it has them.

One for each node and environment, started by the first replica that needs it, found by a socket in a folder that only
its owner can enter. It stays single-threaded and touches no accelerator, so a fork of it is a sound beginning. Without
it, or when it will not start, an engine's process is started plainly; all that is lost then is time.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fastserve.plan.environment import engine_environment
from fastserve.stages.serve.engine_process import GREETING, preload, run

FOLDER_VARIABLE = "FASTSERVE_ENGINES"
"""Names the folder of a node's warm processes; without it there are none."""

SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"
"""Where vLLM makes the sockets between an engine and its server. A name adds 37 characters, and the whole path may have
107; a head's folder leaves room."""

WARM = "fastserve.stages.serve.warm"
PLAIN = "fastserve.stages.serve.engine_process"
"""What the interpreter runs as either process."""

START_SECONDS = 120.0
"""Longest wait for the imports; 7 s are usual."""

GREETING_SECONDS = 20.0
"""Longest wait for a process that was asked for; a fork takes milliseconds, an interpreter less than a second."""

OWN_TO_EACH = frozenset(("VLLM_LOGGING_PREFIX",))
"""Variables of an engine that its process can still change after the imports."""

MODULES = (
    "fastserve.stages.serve.mlfq",
    "uvicorn",
    "uvloop",
    "vllm.entrypoints.launchers.api_server.app_state",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.models.llama",
)
"""What engines import; the workers' own modules follow from the platform. One that is missing is left out."""

log = logging.getLogger("fastserve.serve")


# -- the side of a replica ---------------------------------------------------------------------------------------------


def own_sockets(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with the folder of the head in which the engine makes its sockets; by itself it takes the machine's
    temporary folder, where those of an engine that is killed would stay for good."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return dict(env)
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s cannot be made (%s); the engine's sockets go to the temporary folder", folder, error)
        return dict(env)
    return {**env, SOCKETS_VARIABLE: folder}


def engine_process(env: Mapping[str, str]) -> socket.socket:
    """A line to a new process that waits for an order, forked if it can be.

    env: the engine's environment variables, as `plan.engine.engine_env` makes them.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        try:
            return _forked(Path(folder), env)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("no warm process (%s); the engine starts plainly", error)
    return _plain(env)


def _forked(folder: Path, env: Mapping[str, str]) -> socket.socket:
    path = _path(folder, env)
    with contextlib.suppress(OSError):
        return _connect(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / f"{path.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several replicas may start at once; one of them starts the process
        with contextlib.suppress(OSError):
            return _connect(path)
        _start(path, env)
        return _connect(path)


def _path(folder: Path, env: Mapping[str, str]) -> Path:
    """The socket of engines with this environment: what was read at import cannot change in a fork."""
    shared = {name: value for name, value in env.items() if name not in OWN_TO_EACH}
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()
    return folder / f"warm-{digest[:12]}.sock"


def _connect(path: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(str(path))
        _await_greeting(line)
    except OSError:
        line.close()
        raise
    return line


def _await_greeting(line: socket.socket) -> None:
    """Raise OSError unless a process at the other end speaks in time."""
    line.settimeout(GREETING_SECONDS)
    if line.recv(len(GREETING)) != GREETING:
        raise ConnectionResetError("it ended before it spoke")
    line.settimeout(None)


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    shared = {name: value for name, value in env.items() if name not in OWN_TO_EACH}
    loaded = ":".join(filter(None, (os.environ.get("LD_PRELOAD"), preload())))
    # First one that no import changes: the place in memory of the first is where titles of processes are written.
    unchanged = {"FASTSERVE_WARM": "1"}
    more = {**shared, **({"LD_PRELOAD": loaded} if loaded else {}), "PYTHONUNBUFFERED": "1"}
    return {**unchanged, **engine_environment(os.environ, more)}


def _start(path: Path, env: Mapping[str, str]) -> None:
    """Start a warm process and wait until it listens. Raises OSError when it does not."""
    path.unlink(missing_ok=True)  # of one that died
    news, told = os.pipe()
    with open(path.with_suffix(".log"), "ab") as output:
        # It leaves its parent at once: Ray ends what a worker leaves behind, and this one outlives many replicas.
        subprocess.run(
            [sys.executable, "-m", WARM, str(path), str(told)],
            env=_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[told],
            start_new_session=True,
            check=False,
            timeout=START_SECONDS,
        )
    os.close(told)
    with open(news, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], START_SECONDS)
        if not ready or pipe.read() != b"ready":
            raise OSError(f"it did not start, see {path.with_suffix('.log')}")


def _plain(env: Mapping[str, str]) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", PLAIN, str(theirs.fileno())],
            env=_environment(env),
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    threading.Thread(target=process.wait, daemon=True).start()  # else it would stay in the process table
    _await_greeting(ours)
    return ours


# -- the process -------------------------------------------------------------------------------------------------------


def main(
    path: Path, told: int, prepare: Callable[[], None] | None = None, serve: Callable[[socket.socket], None] = run
) -> None:
    """Import, listen, and fork an engine's process for each replica that connects.

    path: of the socket. told: descriptor that learns when it listens. prepare: by default imports what engines need.
    serve: what a fork does with its line.
    """
    if os.fork():
        os._exit(0)
    (prepare or _import)()
    gc.collect()
    gc.freeze()  # so that a child's collector does not write to, and thereby copy, what they share
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        hidden = path.with_suffix(".new")
        hidden.unlink(missing_ok=True)
        listener.bind(str(hidden))
        hidden.chmod(0o600)
        listener.listen(64)
        hidden.rename(path)  # whoever finds the socket finds it listening
        os.write(told, b"ready")
        os.close(told)
        for line in _callers(listener):
            with line:
                if os.fork() == 0:
                    listener.close()
                    serve(line)
                    os._exit(0)


def _import() -> None:
    for module in MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            log.warning("%s is not imported ahead: %s", module, error)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        importlib.import_module("vllm.v1.worker.cpu_worker")


def _callers(listener: socket.socket) -> Iterator[socket.socket]:
    """Replicas that connect. In between, what is left of ended engines is ended too."""
    wake, ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(ring)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready = select.select([listener.fileno(), wake], [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
            _reap()
        if listener.fileno() in ready:
            yield listener.accept()[0]


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
