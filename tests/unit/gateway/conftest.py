"""A real gateway and small real engines on loopback sockets; every test opens its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from random import Random
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp import web

from fastserve.gateway.app import Gateway
from fastserve.gateway.config import Config, Key, Revision, Served, Target
from fastserve.gateway.keys import digest

KEY = "fs-" + "k" * 40
NARROW = "fs-" + "n" * 40
EXPIRED = "fs-" + "e" * 40
LAST_DAY = "fs-" + "l" * 40
TODAY = date(2027, 6, 30)
EngineHandler = Callable[[web.BaseRequest, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after checking that it has exactly the shape of OpenAI's."""
        body = self.json
        assert list(body) == ["error"], body
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["message"], str)
        assert self.headers["Content-Type"].startswith("application/json")
        assert self.headers["X-Request-Id"]
        return dict(body["error"])


@dataclass
class Engine:
    """A small engine: it remembers what it was asked, and answers as its handler says."""

    handler: EngineHandler
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client of a request went away before its answer was complete."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if request.content_type == "application/json" else {"raw": raw}
        self.asked.append(body)
        self.paths.append(request.path)
        self.headers.append(request.headers)
        try:
            return await self.handler(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise


def event(words: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % words.encode()


DONE = b"data: [DONE]\n\n"


async def answers_well(request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
    """A chat of three tokens, streamed or whole."""
    if not body.get("stream"):
        message = {"role": "assistant", "content": "Paris"}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return web.json_response(
            {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": choices,
                "usage": usage,
            }
        )
    return await streams(request, [event("The"), event(" capital"), event(" is Paris"), DONE])


async def streams(request: web.BaseRequest, pieces: list[bytes], gap_seconds: float = 0.0) -> web.StreamResponse:
    """Write pieces as they are, one write each."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        await asyncio.sleep(gap_seconds)
    await response.write_eof()
    return response


@dataclass
class Stand:
    """A gateway, its engines and a client."""

    gateway: Gateway
    session: aiohttp.ClientSession
    stack: contextlib.AsyncExitStack
    port: int = 0

    async def engine(self, handler: EngineHandler = answers_well) -> Engine:
        """Start an engine; it serves nothing until a model names it."""
        engine = Engine(handler)
        runner = web.ServerRunner(web.Server(engine.handle, handler_cancellation=True), shutdown_timeout=0.1)
        engine.url = f"http://127.0.0.1:{await listen(runner)}/m/one"
        self.stack.push_async_callback(runner.cleanup)
        return engine

    def serve(self, *revisions: Revision, model: str = "chat", task: str = "generate", **more: Any) -> None:
        """Make `model` answer with these revisions."""
        models = {**self.gateway.config.models, model: Served(task, 1764000000, revisions, **more)}
        self.gateway.replace(replace(self.gateway.config, models=models))

    async def one_engine(self, handler: EngineHandler = answers_well, slots: int = 0, **more: Any) -> Engine:
        engine = await self.engine(handler)
        self.serve(Revision("a" * 64, 100, (Target(engine.url, slots),)), **more)
        return engine

    def stats(self) -> dict[str, Any]:
        """The gateway's figures since its start, of all models."""
        gateway = self.gateway
        models = gateway.statistics.to_json(0, gateway.config.models, gateway.hold.waiting)["models"]
        return dict(models)

    async def ask(
        self,
        body: object | None = None,
        path: str = "/v1/chat/completions",
        *,
        method: str = "POST",
        key: str | None = KEY,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Answer:
        given = {"Content-Type": "application/json"}
        if key is not None:
            given["Authorization"] = f"Bearer {key}"
        given.update(headers or {})
        payload = json.dumps(body).encode() if body is not None else data
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.session.request(method, url, data=payload, headers=given) as response:
            return Answer(response.status, response.headers, await response.read())

    async def raw(self, request: bytes, wait_seconds: float = 60.0) -> bytes:
        """Send bytes as they are; the first answer, and all that comes after it until the gateway closes, or falls
        silent for a moment."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        got = b""
        try:
            writer.write(request)
            writer.write_eof() if not request else None
            async with asyncio.timeout(wait_seconds):
                got = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", got)
                has_body = length is not None and not request.startswith(b"HEAD ")
                got += await reader.readexactly(int(length[1]) if length is not None and has_body else 0)
                while piece := await asyncio.wait_for(reader.read(65536), 0.02):
                    got += piece
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return got


async def listen(runner: web.ServerRunner) -> int:
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port: int = runner.addresses[0][1]
    return port


def chat(**more: Any) -> dict[str, Any]:
    """The smallest right request, and what a test adds to it."""
    return {"model": "chat", "messages": [{"role": "user", "content": "hi"}], **more}


def usual_config(**more: Any) -> Config:
    keys = (
        Key("team", digest(KEY), ("*",)),
        Key("narrow", digest(NARROW), ("other",)),
        Key("expired", digest(EXPIRED), ("*",), date(2027, 6, 29)),
        Key("last-day", digest(LAST_DAY), ("*",), TODAY),
    )
    return Config(port=0, keys=keys, drain_seconds=0.2, **more)


async def until(check: Callable[[], object], seconds: float = 100.0) -> None:
    """Wait for something to become true; `seconds` is for a machine that stands still for a while."""
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def stand_up(patience: Mapping[str, float], **more: Any) -> AsyncIterator[Stand]:
    async with contextlib.AsyncExitStack() as stack:
        gateway = Gateway(usual_config(**more), random=Random(1), today=lambda: TODAY, **patience)
        runner = web.ServerRunner(gateway.server, shutdown_timeout=0.1)
        port = await listen(runner)
        stack.push_async_callback(runner.cleanup)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        try:
            yield Stand(gateway, session, stack, port)
        finally:
            await gateway.close(0.0)


CALM = {"first_comment_seconds": 600.0}
"""On a machine that stands still for a second, no answer is to hold a comment that its test does not expect."""

Scenario = Callable[[Stand], Coroutine[Any, Any, None]]


@pytest.fixture
def play() -> Callable[..., None]:
    """Run a scenario against a gateway of its own: `play(scenario, **config)`."""

    def run(scenario: Scenario, patience: Mapping[str, float] | None = None, **more: Any) -> None:
        async def whole() -> None:
            async with asyncio.timeout(200), stand_up(patience or CALM, **more) as stand:
                await scenario(stand)

        uvloop.run(whole())  # as the process does

    return run


@pytest.fixture
def kit() -> Any:
    """The names of this module, for tests to build with."""
    return types.SimpleNamespace(
        KEY=KEY,
        NARROW=NARROW,
        EXPIRED=EXPIRED,
        LAST_DAY=LAST_DAY,
        TODAY=TODAY,
        DONE=DONE,
        chat=chat,
        event=event,
        streams=streams,
        answers_well=answers_well,
        usual_config=usual_config,
        until=until,
        listen=listen,
    )
