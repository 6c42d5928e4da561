"""The ASGI application around an engine: health, and what it does without one."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastserve.errors import EngineFailed
from fastserve.stages.serve import server
from fastserve.stages.serve.server import EngineServer, prepare_environment

Message = MutableMapping[str, Any]


class Engine:
    """As much of an engine as its health shows."""

    def __init__(self, errored: bool = False, hangs: bool = False, unfinished: bool = False) -> None:
        self.errored = errored
        self.hangs = hangs
        self.asked = 0
        self.computed: list[str] = []
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: unfinished)

    async def generate(self, prompt: Any, parameters: Any, name: str) -> AsyncIterator[str]:
        await asyncio.sleep(60 if self.hangs else 0)
        self.computed.append("generate")
        yield name

    async def encode(self, prompt: Any, parameters: Any, name: str) -> AsyncIterator[str]:
        await asyncio.sleep(60 if self.hangs else 0)
        self.computed.append(parameters["task"])
        yield name

    async def is_sleeping(self) -> bool:
        self.asked += 1
        await asyncio.sleep(60 if self.hangs else 0)
        return False


async def _ask(app: EngineServer) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "path": "/health"}, receive, send)
    return sent


async def _answers(scope: Message, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_a_request_reaches_the_engines_own_application() -> None:
    assert asyncio.run(_ask(EngineServer(Engine(), _answers)))[0]["status"] == 200


def test_without_an_engine_a_request_is_told_to_come_back() -> None:
    assert asyncio.run(_ask(EngineServer()))[0]["status"] == 503


def test_a_dead_engine_takes_no_more_requests() -> None:
    assert asyncio.run(_ask(EngineServer(Engine(errored=True), _answers)))[0]["status"] == 503


def test_a_dead_engine_is_sick_at_once() -> None:
    with pytest.raises(EngineFailed, match="has ended"):
        asyncio.run(EngineServer(Engine(errored=True), _answers).check())


def test_a_server_that_answered_just_now_is_not_asked() -> None:
    engine = Engine()
    asyncio.run(EngineServer(engine, _answers).check())
    assert engine.asked == 0


def test_a_busy_engine_is_asked_between_its_steps_and_not_for_a_token() -> None:
    engine = Engine()

    async def busy() -> None:
        done = asyncio.Event()

        async def slow(scope: Message, receive: Any, send: Any) -> None:
            await done.wait()

        app = EngineServer(engine, slow, tasks=("generate",))
        request = asyncio.create_task(_ask(app))
        await asyncio.sleep(0)
        await app.check()
        done.set()
        await request

    asyncio.run(busy())
    assert engine.asked == 1


@pytest.fixture
def short_patience() -> Iterator[None]:
    before, server.CHECK_SECONDS = server.CHECK_SECONDS, 0.05
    yield
    server.CHECK_SECONDS = before


@pytest.mark.usefixtures("short_patience")
def test_an_engine_that_hangs_under_load_is_sick() -> None:
    async def busy() -> None:
        async def never(scope: Message, receive: Any, send: Any) -> None:
            await asyncio.sleep(60)

        app = EngineServer(Engine(hangs=True), never)
        request = asyncio.create_task(_ask(app))
        await asyncio.sleep(0)
        try:
            await app.check()
        finally:
            request.cancel()

    with pytest.raises(EngineFailed, match="no sign of life"):
        asyncio.run(busy())


class Signals:
    """An engine's steps, the last progress so many seconds ago."""

    def __init__(self, seconds: float) -> None:
        self.moved_at = time.monotonic() - seconds

    def values(self) -> dict[str, float]:
        return {"running": 1.0}


def _checked_under_load(engine: Engine, signals: Any, seconds: float) -> EngineServer:
    """A server that was asked how it is after a request has run for so long."""

    async def busy() -> EngineServer:
        done = asyncio.Event()

        async def slow(scope: Message, receive: Any, send: Any) -> None:
            await done.wait()

        app = EngineServer(engine, slow, tasks=("generate",), signals=signals)
        request = asyncio.create_task(_ask(app))
        await asyncio.sleep(seconds)
        try:
            await app.check()
        finally:
            done.set()
            await request
        return app

    return asyncio.run(busy())


@pytest.mark.usefixtures("short_patience")
def test_an_engine_whose_loop_turns_and_computes_nothing_is_sick() -> None:
    with pytest.raises(EngineFailed, match="computed nothing"):
        _checked_under_load(Engine(unfinished=True), Signals(1), 0.1)


@pytest.mark.usefixtures("short_patience")
def test_an_engine_that_computes_is_well_however_long_it_takes() -> None:
    _checked_under_load(Engine(unfinished=True), Signals(-10), 0.1)


@pytest.mark.usefixtures("short_patience")
def test_a_request_that_just_came_is_given_time() -> None:
    _checked_under_load(Engine(unfinished=True), Signals(100), 0)


@pytest.mark.usefixtures("short_patience")
def test_a_request_outside_the_engine_makes_it_not_sick() -> None:
    _checked_under_load(Engine(unfinished=False), Signals(1), 0.1)


def test_a_stuck_engine_takes_no_more_requests(short_patience: None) -> None:
    async def stuck() -> list[Message]:
        app = EngineServer(Engine(hangs=True), _answers)
        app._in_flight = 1
        with pytest.raises(EngineFailed):
            await app.check()
        return await _ask(app)

    assert asyncio.run(stuck())[0]["status"] == 503


@pytest.mark.parametrize(("tasks", "asked"), [(("generate",), "generate"), (("embed", "token_embed"), "embed")])
def test_an_idle_engine_must_do_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, tasks: tuple[str, ...], asked: str
) -> None:
    vllm = ModuleType("vllm")
    vllm.PoolingParams = vllm.SamplingParams = lambda **settings: settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.0)
    engine = Engine()
    asyncio.run(EngineServer(engine, _answers, tasks=tasks).check())
    assert engine.computed == [asked]


@pytest.mark.usefixtures("short_patience")
def test_an_idle_engine_that_computes_nothing_is_sick(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ModuleType("vllm")
    vllm.PoolingParams = vllm.SamplingParams = lambda **settings: settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.0)
    with pytest.raises(EngineFailed, match="no sign of life"):
        asyncio.run(EngineServer(Engine(hangs=True), _answers, tasks=("embed",)).check())


def test_adapters_of_an_engine_without_them_are_reported() -> None:
    app = EngineServer(Engine(), _answers, signals=Signals(0))  # type: ignore[arg-type]
    (refused,) = asyncio.run(app.set_adapters([{"name": "de", "path": "/de"}]))
    assert refused["name"] == "de"
    assert app.stats() == {"running": 1.0, "adapters_refused": 1.0}
    assert EngineServer().stats() == {}


def test_the_lifespan_is_agreed_to() -> None:
    async def live() -> list[str]:
        asked = iter(["lifespan.startup", "lifespan.shutdown"])
        said: list[str] = []

        async def receive() -> Message:
            return {"type": next(asked)}

        async def send(message: Message) -> None:
            said.append(message["type"])

        await EngineServer()({"type": "lifespan"}, receive, send)
        return said

    assert asyncio.run(live()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.fixture
def ambient() -> Iterator[Callable[[str, str], None]]:
    before = dict(os.environ)
    yield os.environ.__setitem__
    os.environ.clear()
    os.environ.update(before)


def test_addresses_of_services_are_gone_before_vllm_reads_them(ambient: Callable[[str, str], None]) -> None:
    ambient("VLLM_PORT", "tcp://10.96.0.10:8000")
    ambient("VLLM_SERVICE_HOST", "10.96.0.10")
    ambient("VLLM_USE_V1", "0")
    prepare_environment({"VLLM_NO_USAGE_STATS": "1"})
    assert not {"VLLM_PORT", "VLLM_SERVICE_HOST", "VLLM_USE_V1"} & set(os.environ)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
