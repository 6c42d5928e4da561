"""A replica's side of its engine: a process beside it that serves HTTP itself, and the line to it.

The gateway goes to that process directly. Requests that come through Serve (those that waited while there was no
replica) are passed on from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from fastserve.errors import EngineFailed
from fastserve.plan.environment import engine_environment
from fastserve.stages.serve import warm
from fastserve.stages.serve.engine_process import LONGEST_LINE_BYTES, LOOPBACK
from fastserve.stages.serve.server import CHECK_SECONDS, LAST_ANSWERS_SECONDS, Receive, Scope, Send, lifespan

MARGIN_SECONDS = 5.0
"""On top of the engine's own deadline for a sign of life."""

log = logging.getLogger("fastserve.serve")
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"host", b"content-length", b"expect"))


class RemoteServer:
    """An engine's server in a process of its own, as an ASGI application with the same calls."""

    def __init__(self) -> None:
        self._url: str | None = None
        self._pid = 0
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    @property
    def url(self) -> str | None:
        """Where the engine answers on loopback; None until it does."""
        return self._url

    async def start(self, model: Path, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the process and load the Hugging Face folder `model`. Raises EngineFailed in the engine's words."""
        env = warm.own_sockets(env)
        try:
            line = await asyncio.to_thread(warm.engine_process, env)
        except OSError as error:
            raise EngineFailed(f"the engine's process did not start: {error}; see the log of the replica") from error
        order = {"model": str(model), "argv": list(argv), "env": engine_environment(os.environ, env)}
        await asyncio.to_thread(_order, line, order)
        line.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=line, limit=LONGEST_LINE_BYTES)
        first = json.loads(await self._reader.readline() or "{}")
        if "port" not in first:
            self._writer.close()
            raise EngineFailed(first.get("failed") or "the engine's process ended while it started; see its log")
        self._url, self._pid = f"http://{LOOPBACK}:{first['port']}", first["pid"]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._listening = asyncio.get_running_loop().create_task(self._listen())

    async def call(self, name: str, *args: Any) -> Any:
        """Call a method of the engine's server; arguments and result are JSON values. Raises EngineFailed."""
        if self._url is None or self._listening.done():
            raise EngineFailed("the engine's process has ended; Serve replaces this replica")
        number = next(self._numbers)
        found = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"id": number, "call": name, "args": args}).encode() + b"\n")
        return await found

    async def check(self) -> None:
        """Raise EngineFailed unless the engine shows that it works; a process that does not even say no is ended."""
        try:
            async with asyncio.timeout(CHECK_SECONDS + MARGIN_SECONDS):
                await self.call("check")
        except TimeoutError as error:
            self._end_group()
            raise EngineFailed(
                f"the engine's process said nothing for {CHECK_SECONDS:.0f}s; Serve replaces this replica"
            ) from error

    async def _listen(self) -> None:
        """Hand each result to whoever waits for it, until the process is gone."""
        while text := await self._reader.readline():
            said = json.loads(text)
            waiting = self._waiting.pop(said["id"])
            if waiting.done():
                continue  # whoever asked gave up
            if "failed" in said:
                waiting.set_exception(EngineFailed(said["failed"]))
            else:
                waiting.set_result(said["value"])
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EngineFailed("the engine's process has ended; Serve replaces this replica"))

    async def exit_when_dead(self) -> None:
        """When the engine's process has ended, end this one, so that Serve starts another one at once."""
        await asyncio.wait([self._listening])
        log.error("the engine's process has ended; this replica ends too and Serve starts another")
        self._end_group()
        await asyncio.sleep(LAST_ANSWERS_SECONDS)
        os._exit(1)

    def _end_group(self) -> None:
        """What is left of it: the engine's own process outlives its server."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Let the streams that run end, then the engine."""
        if self._url is None:
            return
        with contextlib.suppress(EngineFailed):
            await self.call("drain")
            await self.call("stop")
        self._url = None
        self._listening.cancel()
        self._writer.close()
        await self._session.close()

    # -- requests that come through Serve -----------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        if self._url is None or self._listening.done():
            await _unavailable(send)
            return
        body = await _body(receive)
        if body is None:
            return
        passing = asyncio.ensure_future(self._pass_on(scope, body, send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait([passing, leaving], return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                await passing
        finally:
            passing.cancel()  # closes the connection, and that aborts the generation
            leaving.cancel()

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        path = scope["path"][len(scope.get("root_path", "")) :] or "/"
        query = scope.get("query_string", b"").decode("latin-1")
        url = URL(f"{self._url}{quote(path)}{'?' + query if query else ''}", encoded=True)
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k not in _HOP_BY_HOP]
        began = False
        try:
            async with self._session.request(
                scope["method"], url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                passed = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in _HOP_BY_HOP]
                await send({"type": "http.response.start", "status": answer.status, "headers": passed})
                began = True
                while piece := await answer.content.readany():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, OSError):
            if began:
                raise  # cut, so that whoever reads sees that it is not whole
            await _unavailable(send)
            return
        await send({"type": "http.response.body", "body": b""})


def publish(replica: str, url: str | None, seconds: Mapping[str, float]) -> Callable[[], None]:
    """Tell whoever writes the gateway's targets where a replica's engine answers; returns how to take it back.

    replica: its id, as Serve tells it. seconds: what its start was made of. Nothing is told where there is no folder
    for it (`warm.FOLDER_VARIABLE`).
    """
    folder = os.environ.get(warm.FOLDER_VARIABLE)
    if not folder or url is None:
        return lambda: None
    path = Path(folder) / f"{replica}.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden = path.with_suffix(".new")
    hidden.write_text(json.dumps({"url": url, "seconds": dict(seconds)}))
    hidden.rename(path)
    return lambda: path.unlink(missing_ok=True)


def _order(line: socket.socket, value: Mapping[str, Any]) -> None:
    """Tell a new process what to serve, and hand it this process's output."""
    socket.send_fds(line, [b"\0"], [1, 2])
    line.sendall(json.dumps(value).encode() + b"\n")


async def _body(receive: Receive) -> bytes | None:
    """The request's whole body; None when the client went away before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unavailable(send: Send) -> None:
    await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"1")]})
    await send({"type": "http.response.body", "body": b""})
