"""The gateway as a process: its start, its config file, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import httpx
import psutil
import pytest
from aiohttp import web
from kube_objects import KubeObjects, served

from fastserve.cluster.kube.gateway import KubeGateway
from fastserve.cluster.processes import free_port
from fastserve.errors import UsageInvalid
from fastserve.gateway.__main__ import waiting
from fastserve.gateway.config import Config, Revision, Served, Target, read, to_json, write
from fastserve.gateway.keys import digest

PLATFORM = Path(__file__).parents[3] / "platform"


class Process:
    """A gateway process; its log is read line by line."""

    def __init__(self, file: Path, *words: str) -> None:
        self.file = file
        self.log: list[dict[str, object]] = []
        self._out = file.with_suffix(".log").open("w+")
        command = [sys.executable, "-m", "fastserve.gateway", "--config", str(file), *words]
        environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
        self.popen = subprocess.Popen(command, stdout=self._out, stderr=subprocess.STDOUT, env=environment)

    def wait_for(self, event: str, seconds: float = 100.0) -> dict[str, object]:
        """The first line of the log whose event begins so."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in self.lines():
                if str(line["event"]).startswith(event):
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no '{event}' in {self.lines()}")

    def lines(self) -> list[dict[str, object]]:
        text = self.file.with_suffix(".log").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def url(self) -> str:
        return str(self.wait_for("listening")["address"])

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self._out.close()


@contextlib.contextmanager
def gateway(folder: Path, config, *words: str):
    file = folder / "gateway.json"
    write(file, config)
    process = Process(file, *words)
    try:
        yield process
    finally:
        process.close()


async def models(session, url, key):
    async with session.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
        body = await response.json()
        return [row["id"] for row in body["data"]] if response.status == 200 else response.status


async def until(check, wanted, seconds=100.0):
    async with asyncio.timeout(seconds):
        while await check() != wanted:
            await asyncio.sleep(0.02)


def with_model(config, name, *targets):
    return replace(config, models={name: Served("generate", 1, (Revision("a" * 64, 1, tuple(map(Target, targets))),))})


def test_it_listens_on_loopback_only(tmp_path, kit):
    with gateway(tmp_path, kit.usual_config()) as process:
        process.wait_for("listening")
        listeners = [c.laddr.ip for c in psutil.Process(process.popen.pid).net_connections() if c.status == "LISTEN"]
        assert listeners == ["127.0.0.1"]


def test_orders_as_an_operator_writes_them_take_four_mebibytes_and_not_one_byte_more(tmp_path, kit):
    """Public case 18: bounds are numbers on their way through a ConfigMap."""
    objects = KubeObjects()
    with served(objects) as api:
        KubeGateway(api, "models", None).configure({}, kit.usual_config().keys, free_port())
    (orders,) = (item["data"]["config.json"] for item in objects.objects.values() if item["kind"] == "ConfigMap")
    file = tmp_path / "orders.json"
    file.write_text(json.dumps({**json.loads(orders), "adminPort": free_port()}))  # a pod has a fixed one for itself

    async def scenario(process):
        address = process.url().replace("0.0.0.0", "127.0.0.1")
        headers = {"Authorization": f"Bearer {kit.KEY}", "Content-Type": "application/json"}
        empty = json.dumps({"model": "absent", "messages": [{"role": "user", "content": ""}]})
        async with aiohttp.ClientSession() as session:
            for length, wanted in ((4194304, 404), (4194305, 413)):
                body = empty.replace('""', f'"{"a" * (length - len(empty))}"')
                assert len(body) == length
                async with session.post(
                    f"{address}/v1/chat/completions", data=io.BytesIO(body.encode()), headers=headers
                ) as answer:
                    assert answer.status == wanted, await answer.text()

    process = Process(file)
    try:
        asyncio.run(scenario(process))
    finally:
        process.close()


def test_it_imports_nothing_heavy():
    code = (
        "import sys, fastserve.gateway.__main__\n"
        "heavy = {'ray', 'torch', 'vllm', 'transformers', 'boto3', 'kubernetes', 'pydantic', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


def refusals(process):
    return [line for line in process.lines() if str(line["event"]).startswith("config not taken")]


def put(file, text):
    """Replace a file in one step: whoever looks meanwhile must not find an empty one."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_a_changed_config_is_taken_and_a_bad_one_is_not(tmp_path, kit):
    config = kit.usual_config()

    async def scenario(process):
        url = process.url()
        async with aiohttp.ClientSession() as session:

            async def listed():
                return await models(session, url, kit.KEY)

            async def refused():
                return len(refusals(process))

            assert await listed() == []
            write(process.file, with_model(config, "one"))
            await until(listed, ["one"])
            for count, bad in enumerate(("{", '{"port": "x"}', None), start=1):
                if bad is None:
                    process.file.unlink()
                else:
                    put(process.file, bad)
                await until(refused, count)
                assert await listed() == ["one"]
            write(process.file, replace(with_model(config, "two"), keys=config.keys[:1]))
            await until(listed, ["two"])
            write(process.file, replace(config, keys=()))
            await until(listed, 401)

    with gateway(tmp_path, config) as process:
        asyncio.run(scenario(process))
        assert len(refusals(process)) == 3
        assert "port" in str(refusals(process)[1]["event"])


def test_a_port_in_use_ends_it_with_code_5_and_words(tmp_path, kit):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with gateway(tmp_path, replace(kit.usual_config(), port=port)) as process:
            assert process.popen.wait(100) == 5
            assert f"port {port} on 127.0.0.1 is in use" in str(process.lines()[-1]["event"])
            assert "Traceback" not in process.file.with_suffix(".log").read_text()


def test_a_missing_config_ends_it_with_code_2_and_words(tmp_path):
    process = Process(tmp_path / "none.json")
    try:
        assert process.popen.wait(100) == 2
        assert "no such file" in str(process.lines()[-1]["event"])
    finally:
        process.close()
    with pytest.raises(UsageInvalid):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("signum", "seconds", "words"),
    [
        (signal.SIGTERM, 100.0, ()),
        (signal.SIGINT, 100.0, ()),
        (signal.SIGTERM, 0.0, ("--drain-seconds=100",)),  # a pod knows how long it may take, its orders do not
    ],
)
def test_a_signal_lets_streams_finish_and_takes_no_new_connection(tmp_path, kit, signum, seconds, words):
    async def scenario():
        go_on = asyncio.Event()

        async def paced(request):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(kit.event("x"))
            await go_on.wait()
            await response.write(kit.event("x") * 19 + kit.DONE)
            return response

        runner = web.ServerRunner(web.Server(paced), shutdown_timeout=0.1)
        target = f"http://127.0.0.1:{await kit.listen(runner)}"
        config = replace(with_model(kit.usual_config(), "chat", target), drain_seconds=seconds)
        with gateway(tmp_path, config, *words) as process:
            url = process.url()
            headers = {"Authorization": f"Bearer {kit.KEY}"}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{url}/v1/chat/completions", json=kit.chat(stream=True), headers=headers) as response,
            ):
                got = await response.content.readuntil(b"\n\n")
                process.popen.send_signal(signum)
                await asyncio.to_thread(process.wait_for, "stopping")

                async def refused():
                    try:
                        await models(session, url, kit.KEY)
                    except aiohttp.ClientConnectorError:
                        return True
                    except aiohttp.ClientError:
                        pass  # it came in while the door was closing
                    return False

                await until(refused, True)
                assert process.popen.poll() is None, "it waits for the stream"
                go_on.set()
                got += await response.content.read()
                assert got == kit.event("x") * 20 + kit.DONE
            assert await asyncio.to_thread(process.popen.wait, 100) == 0
            assert "Traceback" not in process.file.with_suffix(".log").read_text()
        await runner.cleanup()

    asyncio.run(scenario())


def test_a_signal_tells_those_who_wait(tmp_path, kit):
    port, token = free_port(), "fs-" + "t" * 40

    async def scenario(process):
        url = process.url()
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        async with aiohttp.ClientSession() as session:

            async def held():
                door = {"Authorization": f"Bearer {token}"}
                async with session.get(f"http://127.0.0.1:{port}/stats", headers=door) as answer:
                    return (await answer.json())["models"]["chat"]["held"]

            def ask(stream):
                return session.post(f"{url}/v1/chat/completions", json=kit.chat(stream=stream), headers=headers)

            whole = asyncio.create_task(ask(False).__aenter__())
            stream = await ask(True).__aenter__()  # its headers come with its first comment
            await until(held, 2)
            process.popen.send_signal(signal.SIGTERM)
            refused = await whole
            assert (refused.status, (await refused.json())["error"]["code"]) == (503, "gateway_stopping")
            assert stream.status == 200
            assert b"gateway_stopping" in await stream.read()
        assert await asyncio.to_thread(process.popen.wait, 100) == 0

    config = replace(with_model(kit.usual_config(), "chat"), drain_seconds=100.0)
    with gateway(tmp_path, replace(config, admin_port=port, admin_sha256=digest(token))) as process:
        asyncio.run(scenario(process))
        assert "Traceback" not in process.file.with_suffix(".log").read_text()


def test_the_admin_port_is_a_door_of_its_own(tmp_path, kit):
    port, token = free_port(), "fs-" + "t" * 40
    config = replace(with_model(kit.usual_config(), "chat"), admin_port=port, admin_sha256=digest(token))

    async def scenario(process):
        url = process.url()
        async with aiohttp.ClientSession() as session:

            async def status(address, path, key):
                headers = {"Authorization": f"Bearer {key}"}
                async with session.get(f"{address}{path}", headers=headers) as response:
                    return response.status

            admin = f"http://127.0.0.1:{port}"
            assert await status(admin, "/stats", token) == 200
            assert await status(admin, "/metrics", token) == 200
            assert await status(admin, "/stats", kit.KEY) == 401
            assert await status(url, "/stats", kit.KEY) == 404
            assert await status(url, "/v1/models", token) == 401

    with gateway(tmp_path, config) as process:
        asyncio.run(scenario(process))


def test_after_a_kill_it_starts_again_on_the_same_port(tmp_path, kit):
    config = replace(kit.usual_config(), port=free_port())  # not of those that the kernel hands to whoever connects
    with gateway(tmp_path, config) as process:
        url = process.url()
        process.popen.kill()
        process.popen.wait()
    with gateway(tmp_path, config) as process:
        assert process.url() == url


def test_without_a_config_yet_it_waits_for_orders_and_takes_them_from_whoever_has_the_token(tmp_path):
    """As a pod that comes up before the operator: alive, not ready, and ready with the orders that it is sent."""
    host, token = "127.7.1.1", "fs-" + "o" * 40  # ports are those of a pod, so an address of its own
    (tmp_path / "sha256").write_text(digest(token) + "\n")
    orders = Config(host=host, port=8100, admin_port=8101, admin_sha256="d" * 64, orders_sha256=digest(token), serial=7)

    def code(what: str, content: str | None = None) -> int:
        port = 8101 if what == "orders" else 8100
        headers = {"Authorization": f"Bearer {token}"}
        method = "GET" if content is None else "PUT"
        with httpx.Client(trust_env=False, headers=headers, timeout=20) as client:
            return client.request(method, f"http://{host}:{port}/{what}", content=content).status_code

    words = ["--config", str(tmp_path / "config.json"), "--orders-sha256", str(tmp_path / "sha256")]
    program = (
        f"import fastserve.gateway.__main__ as m; m.WAITING = m.replace(m.WAITING, host={host!r}); m.main({words})"
    )
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if code("healthz") == 200:
                    break
            assert time.monotonic() < until
            time.sleep(0.05)
        assert code("readyz") == 503
        assert code("v1/models") == 401
        assert code("orders", json.dumps(to_json(orders))) == 200
        assert code("readyz") == 200
        (tmp_path / "config.json").write_text(json.dumps(to_json(replace(orders, serial=6, orders_sha256=""))))
        time.sleep(1)  # an old volume may be seen in that time, and must change nothing whenever it is
        assert code("orders", json.dumps(to_json(orders))) == 200
    finally:
        process.kill()
        process.wait()


def test_what_is_no_sha256_lets_nobody_send_orders(tmp_path):
    for text in ("", "x", "A" * 64):
        (tmp_path / "sha256").write_text(text)
        assert waiting(tmp_path / "sha256").orders_sha256 == ""
    assert waiting(tmp_path / "none").orders_sha256 == ""
