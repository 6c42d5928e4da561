"""The process of one engine: vLLM's server on a port of loopback, and a line to the replica that asked for it.

It is forked from a warm process (`stages.serve.warm`), or started plainly with the same line:
`python -m fastserve.stages.serve.engine_process DESCRIPTOR`. On the line go JSON values, one a line: first the order
(`{"model", "argv", "env"}`), back where it is (`{"port", "pid"}`) or why it is not (`{"failed"}`); then calls of the
engine's server (`{"id", "call", "args"}`) and their results (`{"id", "value"}` or `{"id", "failed"}`), in any order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from fastserve.errors import FastServeError
from fastserve.stages.serve.server import EngineServer

LOOPBACK = "127.0.0.1"
GREETING = b"\n"
"""The first that a new process says: a line to a process that is just dying can still be opened."""

LONGEST_LINE_BYTES = 16 * 2**20
KEEP_ALIVE_SECONDS = 75
"""Longer than any client of ours keeps an idle connection, so that none is closed under a request."""

log = logging.getLogger("fastserve.serve")


def run(
    line: socket.socket,
    make: Callable[[], EngineServer] = EngineServer,
    around: Callable[[], AbstractContextManager[Any]] | None = None,
) -> NoReturn:
    """Serve the replica at the other end of `line` until it goes away. Needs a process of one thread.

    make: the engine's server. around: what holds while it runs; by default `forked_engines`.
    """
    line.sendall(GREETING)
    _name("FastServe::EngineServer")
    os.setsid()  # a group of its own, so that it ends together with its engine
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(line, 1, 2)
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)  # what it writes goes where the replica's own words go
        os.close(stream)
    order = json.loads(_first_line(line))
    os.environ.clear()
    os.environ.update(order["env"])
    _prefix_vllm_log(order["env"].get("VLLM_LOGGING_PREFIX", ""))
    os.register_at_fork(after_in_child=line.close)  # else the line would live on in the engine's process
    threading.Thread(target=_end_with_replica, args=(line,), daemon=True).start()
    import uvloop

    with (around or forked_engines)():
        uvloop.run(_serve(line, order, make()))
    _end()


def _name(title: str) -> None:
    """Show `title` in lists of processes. The first use must come before the environment is replaced, whose place in
    memory it looks for; vLLM then names the engine's process so."""
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(title)


def _first_line(line: socket.socket) -> bytes:
    found = bytearray()
    while not found.endswith(b"\n"):
        piece = line.recv(2**16)
        if not piece or len(found) > LONGEST_LINE_BYTES:
            _end()
        found += piece
    return bytes(found)


def _end_with_replica(line: socket.socket) -> None:
    """A replica that is gone, however it went, needs no engine. A thread, for a loading engine blocks the loop."""
    gone = select.poll()
    gone.register(line, select.POLLRDHUP | select.POLLHUP)
    gone.poll()
    _end()


def _end() -> NoReturn:
    """End this process and all that it started, at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise SystemExit(1)


def _prefix_vllm_log(prefix: str) -> None:
    """vLLM took its prefix from the environment when it was imported; in a forked process that was another one."""
    known = sys.modules.get("vllm.logger")
    if known is None:
        return  # not imported yet: it will read the environment itself
    for handler in logging.getLogger("vllm").handlers:
        if handler.formatter is not None:
            handler.formatter._style._fmt = prefix + known._FORMAT


@contextlib.contextmanager
def forked_engines() -> Iterator[None]:
    """On a CPU let vLLM fork the engine's process instead of starting a new interpreter that imports all again.

    vLLM's CPU platform demands a new interpreter so that its OpenMP library is loaded first; here it is (`preload`).
    With accelerators vLLM decides itself: it forks unless CUDA was already used.
    """

    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    before = utils.get_mp_context
    if current_platform.is_cpu():
        utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    try:
        yield
    finally:
        utils.get_mp_context = before


async def _serve(line: socket.socket, order: Mapping[str, Any], server: EngineServer) -> None:
    line.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=line, limit=LONGEST_LINE_BYTES)

    def say(value: Mapping[str, Any]) -> None:
        writer.write(json.dumps(value).encode() + b"\n")

    try:
        await server.start(Path(order["model"]), order["argv"])
    except FastServeError as error:
        say({"failed": str(error)})
        await writer.drain()
        return
    gc.collect()
    gc.freeze()  # as vLLM's own server does: what stays for good need not be looked through again and again
    listener = socket.create_server((LOOPBACK, 0), backlog=2048)
    http = asyncio.create_task(_http(server, listener))
    watch = asyncio.create_task(server.exit_when_dead())
    say({"port": listener.getsockname()[1], "pid": os.getpid()})
    calls: set[asyncio.Task[None]] = set()
    while text := await reader.readline():
        task = asyncio.create_task(_call(server, json.loads(text), say))
        calls.add(task)
        task.add_done_callback(calls.discard)
    http.cancel()
    watch.cancel()


async def _http(server: EngineServer, listener: socket.socket) -> None:
    """As vLLM serves itself: uvicorn, without a log line for each request."""
    import uvicorn

    config = uvicorn.Config(
        server,
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    await uvicorn.Server(config)._serve([listener])  # `serve` would take over the process's signals


async def _call(server: EngineServer, asked: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None]) -> None:
    name = asked["call"]
    try:
        if name.startswith("_"):
            raise AttributeError(f"{name} is no call of the engine's server")
        value = getattr(server, name)(*asked["args"])
        if asyncio.iscoroutine(value):
            value = await value
        say({"id": asked["id"], "value": value})
    except Exception as error:  # the replica raises it
        if not isinstance(error, FastServeError):
            log.exception("%s failed", name)
        say({"id": asked["id"], "failed": str(error) or type(error).__name__})


def preload() -> str:
    """Libraries that vLLM wants loaded before all others in the engine's process (its CPU platform sets the same)."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    found = [*folder.parent.glob("torch.libs/libgomp*.so*"), *folder.glob("lib/libgomp*.so*")][:1]
    return ":".join(str(path) for path in found)


if __name__ == "__main__":
    run(socket.socket(fileno=int(sys.argv[1])))
