"""A replica's engine in a process of its own: asked, passed on to, drained, and ended with whoever goes first."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from fastserve.errors import EngineFailed
from fastserve.stages.serve import remote, warm
from fastserve.stages.serve.remote import RemoteServer, publish

DOUBLES = Path(__file__).parents[3] / "doubles"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of warm processes; those that were started are ended."""
    monkeypatch.setattr(warm, "WARM", "engine_stand_in")
    monkeypatch.setattr(warm, "PLAIN", "engine_stand_in")
    monkeypatch.setattr(warm, "preload", lambda: "")
    monkeypatch.setenv("PYTHONPATH", f"{DOUBLES}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv(warm.FOLDER_VARIABLE, str(tmp_path / "engines"))
    yield tmp_path / "engines"
    gc.collect()  # else finalisers of connections run while Python parses something, which 3.11 does not bear
    for process in warm_ones(tmp_path):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def warm_ones(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "engine_stand_in" in line and any(part.startswith(str(folder)) for part in line):
            found.append(process)
    return found


def until(true: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def started(folder: Path, **env: str) -> RemoteServer:
    server = RemoteServer()
    await server.start(folder.parent, [], env)
    return server


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def asked(server: RemoteServer, path: str, body: bytes = b"", query: bytes = b"") -> list[dict[str, Any]]:
    """A request as Serve makes it, under the application's prefix."""
    sent: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": f"/m/chat{path}", "root_path": "/m/chat", "query_string": query,
        "headers": [(b"host", b"x"), (b"content-length", b"%d" % len(body))],
    }  # fmt: skip
    await server(scope, receive, send)
    return sent


def test_it_answers_calls_and_http_and_ends_when_it_is_told(folder: Path) -> None:
    async def scenario() -> tuple[int, int]:
        server = await started(folder, COLOUR="red")
        about = await server.call("about")
        assert about["env"]["COLOUR"] == "red"
        with pytest.raises(EngineFailed, match="too hot"):
            await server.call("refuse", "too hot")
        with pytest.raises(EngineFailed, match="no call"):
            await server.call("_compute")
        async with aiohttp.ClientSession() as session, session.post(f"{server.url}/v1/x?a=b", data=b"hello") as answer:
            assert (answer.status, await answer.text()) == (200, "/v1/x?a=b hello")
        start, *pieces = await asked(server, "/v1/x", b"hello", b"a=b")
        assert start["status"] == 200
        assert (b"content-type", b"text/plain") in start["headers"]
        assert b"".join(piece["body"] for piece in pieces) == b"/v1/x?a=b hello"
        await server.stop()
        assert (await asked(server, "/v1/x"))[0]["status"] == 503
        return server._pid, about["child"]

    pid, child = asyncio.run(scenario())
    until(lambda: gone(pid) and gone(child))


def test_why_an_engine_does_not_come_up_is_said_in_its_own_words(folder: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(EngineFailed, match="cannot serve missing"):
            await RemoteServer().start(folder / "missing", [], {})

    asyncio.run(scenario())


def test_an_engine_is_named_whatever_variable_its_node_has_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A title is written where the first variable stood when the process began, and imports change variables."""
    others = dict(os.environ)
    for name in others:
        monkeypatch.delenv(name)
    for name, value in {"CHANGED_BY_IMPORTS": "no", **others}.items():
        monkeypatch.setenv(name, value)

    async def scenario() -> None:
        server = await started(folder)
        assert (await server.call("about"))["env"]["CHANGED_BY_IMPORTS"] == "no", "its own are those of its replica"
        assert psutil.Process(server._pid).cmdline()[0].startswith("FastServe::EngineServer")
        await server.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("warm_one", [True, False], ids=["forked", "plain"])
def test_services_and_settings_of_others_do_not_reach_an_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warm_one: bool
) -> None:
    """Public case 16, as in a pod that gets the links of Services: neither at its start nor later."""
    links = {"VLLM_PORT": "tcp://10.96.0.10:8000", "VLLM_SERVICE_HOST": "10.96.0.10", "VLLM_SERVICE_PORT": "8000"}
    settings = {"VLLM_USE_V1": "0", "RAY_ADDRESS": "10.0.0.1:6379", "REDIS_PORT": "tcp://10.96.0.12:6379"}
    named = {"VLLM_NAMED": "yes", "FASTSERVE_ENGINE_VARIABLES": "VLLM_NAMED"}
    # A title of a process is else written over the environment that the kernel shows.
    for name, value in {**links, **settings, **named, "SPT_NOENV": "1"}.items():
        monkeypatch.setenv(name, value)
    if not warm_one:
        monkeypatch.delenv(warm.FOLDER_VARIABLE)

    async def scenario() -> None:
        server = await started(folder, VLLM_OWN="ours")
        now = (await server.call("about"))["env"]
        at_start = psutil.Process(server._pid).environ()
        assert (now["VLLM_OWN"], now["VLLM_NAMED"]) == ("ours", "yes")
        for environment in (now, at_start):
            assert not {*links, *settings} & set(environment)
            own = {"VLLM_OWN", "VLLM_NAMED", *([warm.SOCKETS_VARIABLE] if warm_one else [])}
            assert {name for name in environment if name.startswith("VLLM_")} == own
        await server.stop()

    asyncio.run(scenario())


def test_engines_of_one_environment_come_from_one_warm_process(folder: Path) -> None:
    async def scenario() -> None:
        first = await started(folder, VLLM_LOGGING_PREFIX="one ")
        second = await started(folder, VLLM_LOGGING_PREFIX="two ")
        other = await started(folder, OMP_NUM_THREADS="7")
        abouts = [await server.call("about") for server in (first, second, other)]
        assert abouts[0]["parent"] == abouts[1]["parent"] != abouts[2]["parent"]
        assert [about["env"].get("VLLM_LOGGING_PREFIX") for about in abouts] == ["one ", "two ", None]
        for server in (first, second, other):
            await server.stop()

    asyncio.run(scenario())
    sockets = list(folder.glob("*.sock"))
    assert len(sockets) == 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in sockets)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("warm_one", [True, False], ids=["forked", "plain"])
def test_an_engine_makes_its_sockets_where_they_go_with_the_head(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warm_one: bool
) -> None:
    if not warm_one:
        monkeypatch.setattr(warm, "WARM", "no_such_module")

    async def scenario() -> None:
        server = await started(folder)
        about = await server.call("about")
        assert (about["parent"] == os.getpid()) is not warm_one
        assert about["env"]["VLLM_RPC_BASE_PATH"] == str(folder)
        assert folder.is_dir()
        await server.stop()

    asyncio.run(scenario())


def test_an_engine_of_no_head_makes_its_sockets_where_vllm_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(warm.FOLDER_VARIABLE, str(tmp_path / "file" / "engines"))
    assert warm.own_sockets({"A": "1"}) == {"A": "1"}, "a folder that cannot be made"
    monkeypatch.delenv(warm.FOLDER_VARIABLE)
    assert warm.own_sockets({"A": "1"}) == {"A": "1"}


def test_a_warm_process_that_died_is_followed_by_another_and_its_engines_live_on(folder: Path) -> None:
    async def scenario() -> None:
        first = await started(folder)
        (process,) = {item.pid for item in warm_ones(folder)} & {(await first.call("about"))["parent"]}
        os.kill(process, signal.SIGKILL)
        second = await started(folder)
        assert (await second.call("about"))["parent"] != process
        assert (await first.call("about"))["streams"] == 0
        await first.stop()
        await second.stop()

    asyncio.run(scenario())


def test_without_a_warm_process_an_engine_starts_plainly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "WARM", "no_such_module")

    async def scenario() -> None:
        server = await started(folder)
        about = await server.call("about")
        assert about["parent"] == os.getpid()
        await server.stop()
        until(lambda: gone(about["child"]))

    asyncio.run(scenario())


def test_an_engine_ends_with_its_replica_however_that_went(folder: Path) -> None:
    async def scenario() -> tuple[int, int]:
        server = await started(folder)
        child = (await server.call("about"))["child"]
        server._listening.cancel()
        server._writer.close()  # all that a killed process does
        await server._session.close()
        return server._pid, child

    pid, child = asyncio.run(scenario())
    until(lambda: gone(pid) and gone(child))


def test_what_a_killed_server_leaves_is_ended_and_its_replica_learns_of_it(folder: Path) -> None:
    async def scenario() -> int:
        server = await started(folder)
        child: int = (await server.call("about"))["child"]
        os.kill(server._pid, signal.SIGKILL)
        await asyncio.wait_for(asyncio.wait([server._listening]), 100)
        with pytest.raises(EngineFailed, match="ended"):
            await server.call("about")
        assert (await asked(server, "/v1/x"))[0]["status"] == 503
        await server._session.close()
        server._writer.close()
        return child

    child = asyncio.run(scenario())
    until(lambda: gone(child))


def test_a_process_that_says_nothing_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> int:
        server = await started(folder)
        await server.check()
        child: int = (await server.call("about"))["child"]
        os.kill(server._pid, signal.SIGSTOP)
        monkeypatch.setattr(remote, "CHECK_SECONDS", 0.1)
        monkeypatch.setattr(remote, "MARGIN_SECONDS", 0.1)
        with pytest.raises(EngineFailed, match="said nothing"):
            await server.check()
        await asyncio.wait_for(asyncio.wait([server._listening]), 100)
        await server._session.close()
        server._writer.close()
        return child

    child = asyncio.run(scenario())
    until(lambda: gone(child))


def test_a_drained_engine_takes_nothing_new_and_lets_streams_end(folder: Path) -> None:
    async def scenario() -> None:
        server = await started(folder)
        async with aiohttp.ClientSession() as session, session.post(f"{server.url}/stream?100") as answer:
            stopping = asyncio.ensure_future(server.stop())
            status = 200
            while status == 200:  # until it has heard of its end
                async with session.post(f"{server.url}/v1/x") as refused:
                    status = refused.status
            assert status == 503
            assert (await answer.text()).split() == [str(number) for number in range(100)]
        await stopping

    asyncio.run(scenario())


def test_a_client_that_leaves_ends_the_generation_behind_serve(folder: Path) -> None:
    async def scenario() -> None:
        server = await started(folder)
        request = asyncio.ensure_future(asked(server, "/stream", query=b"100000"))
        while not (await server.call("about"))["streams"]:
            await asyncio.sleep(0.02)
        request.cancel()
        while (await server.call("about"))["streams"]:
            await asyncio.sleep(0.02)
        await server.stop()

    asyncio.run(asyncio.wait_for(scenario(), 200))


def test_a_ready_replica_says_where_its_engine_answers_until_it_goes(folder: Path) -> None:
    taken_back = publish("r1", "http://127.0.0.1:7", {"engine": 1.0})
    assert (folder / "r1.json").read_text() == '{"url": "http://127.0.0.1:7", "seconds": {"engine": 1.0}}'
    taken_back()
    assert not list(folder.iterdir())
    taken_back()
