"""The gateway as a process: its start, its config file, its signals."""

from __future__ import annotations

import asyncio
import contextlib
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
import psutil
import pytest
from aiohttp import web

from fastserve.errors import UsageInvalid
from fastserve.gateway.config import Revision, Served, Target, read, write
from fastserve.gateway.keys import digest

PLATFORM = Path(__file__).parents[3] / "platform"


class Process:
    """A gateway process; its log is read line by line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.log: list[dict[str, object]] = []
        self._out = file.with_suffix(".log").open("w+")
        command = [sys.executable, "-m", "fastserve.gateway", "--config", str(file)]
        environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
        self.popen = subprocess.Popen(command, stdout=self._out, stderr=subprocess.STDOUT, env=environment)

    def wait_for(self, event: str, seconds: float = 10.0) -> dict[str, object]:
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
def gateway(folder: Path, config):
    file = folder / "gateway.json"
    write(file, config)
    process = Process(file)
    try:
        yield process
    finally:
        process.close()


async def models(session, url, key):
    async with session.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
        body = await response.json()
        return [row["id"] for row in body["data"]] if response.status == 200 else response.status


async def until(check, wanted, seconds=5.0):
    async with asyncio.timeout(seconds):
        while await check() != wanted:
            await asyncio.sleep(0.02)


def with_model(config, name, *targets):
    return replace(config, models={name: Served("generate", 1, (Revision("a" * 64, 1, tuple(map(Target, targets))),))})


def test_it_starts_in_about_a_second_on_loopback_only(tmp_path, kit):
    started = time.monotonic()
    with gateway(tmp_path, kit.usual_config()) as process:
        process.wait_for("listening")
        assert time.monotonic() - started < 3  # on a busy machine; the bench has the figure
        listeners = [c.laddr.ip for c in psutil.Process(process.popen.pid).net_connections() if c.status == "LISTEN"]
        assert listeners == ["127.0.0.1"]


def test_it_imports_nothing_heavy():
    code = (
        "import sys, fastserve.gateway.__main__\n"
        "heavy = {'ray', 'torch', 'vllm', 'transformers', 'boto3', 'kubernetes', 'pydantic', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PLATFORM)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_changed_config_is_taken_and_a_bad_one_is_not(tmp_path, kit):
    config = kit.usual_config()

    async def scenario(process):
        url = process.url()
        async with aiohttp.ClientSession() as session:

            async def listed():
                return await models(session, url, kit.KEY)

            assert await listed() == []
            write(process.file, with_model(config, "one"))
            await until(listed, ["one"])
            for bad in ("{", '{"port": "x"}'):
                process.file.write_text(bad)
                await asyncio.sleep(0.4)
                assert await listed() == ["one"]
            process.file.unlink()
            await asyncio.sleep(0.4)
            assert await listed() == ["one"]
            write(process.file, replace(with_model(config, "two"), keys=config.keys[:1]))
            await until(listed, ["two"])
            write(process.file, replace(config, keys=()))
            await until(listed, 401)

    with gateway(tmp_path, config) as process:
        asyncio.run(scenario(process))
        refused = [line for line in process.lines() if str(line["event"]).startswith("config not taken")]
        assert len(refused) == 3
        assert "port" in str(refused[1]["event"])


def test_a_port_in_use_ends_it_with_code_5_and_words(tmp_path, kit):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with gateway(tmp_path, replace(kit.usual_config(), port=port)) as process:
            assert process.popen.wait(10) == 5
            assert f"port {port} on 127.0.0.1 is in use" in str(process.lines()[-1]["event"])
            assert "Traceback" not in process.file.with_suffix(".log").read_text()


def test_a_missing_config_ends_it_with_code_2_and_words(tmp_path):
    process = Process(tmp_path / "none.json")
    try:
        assert process.popen.wait(10) == 2
        assert "no such file" in str(process.lines()[-1]["event"])
    finally:
        process.close()
    with pytest.raises(UsageInvalid):
        read(tmp_path / "none.json")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_and_takes_no_new_connection(tmp_path, kit, signum):
    async def paced(request):
        return await kit.streams(request, [*[kit.event("x")] * 20, kit.DONE], 0.02)

    async def scenario():
        runner = web.ServerRunner(web.Server(paced), shutdown_timeout=0.1)
        target = f"http://127.0.0.1:{await kit.listen(runner)}"
        config = replace(with_model(kit.usual_config(), "chat", target), drain_seconds=5.0)
        with gateway(tmp_path, config) as process:
            url = process.url()
            headers = {"Authorization": f"Bearer {kit.KEY}"}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{url}/v1/chat/completions", json=kit.chat(stream=True), headers=headers) as response,
            ):
                got = await response.content.readuntil(b"\n\n")
                process.popen.send_signal(signum)
                await asyncio.to_thread(process.wait_for, "stopping")
                with pytest.raises(aiohttp.ClientConnectorError):
                    await models(session, url, kit.KEY)
                got += await response.content.read()
                assert got == kit.event("x") * 20 + kit.DONE
            assert await asyncio.to_thread(process.popen.wait, 5) == 0
            assert "Traceback" not in process.file.with_suffix(".log").read_text()
        await runner.cleanup()

    asyncio.run(scenario())


def test_a_signal_tells_those_who_wait(tmp_path, kit):
    async def scenario(process):
        url = process.url()
        headers = {"Authorization": f"Bearer {kit.KEY}"}
        async with aiohttp.ClientSession() as session:
            asked = [
                session.post(f"{url}/v1/chat/completions", json=kit.chat(stream=stream), headers=headers)
                for stream in (False, True)
            ]
            waiting = [asyncio.create_task(one.__aenter__()) for one in asked]
            await asyncio.sleep(1.5)  # the stream has its first comment
            process.popen.send_signal(signal.SIGTERM)
            whole, stream = await asyncio.gather(*waiting)
            assert (whole.status, (await whole.json())["error"]["code"]) == (503, "gateway_stopping")
            assert stream.status == 200
            assert b"gateway_stopping" in await stream.read()
        assert await asyncio.to_thread(process.popen.wait, 5) == 0

    config = replace(with_model(kit.usual_config(), "chat"), drain_seconds=5.0)
    with gateway(tmp_path, config) as process:
        asyncio.run(scenario(process))
        assert "Traceback" not in process.file.with_suffix(".log").read_text()


def test_the_admin_port_is_a_door_of_its_own(tmp_path, kit):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = "fs-" + "t" * 40
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
    with gateway(tmp_path, kit.usual_config()) as process:
        url = process.url()
        process.popen.kill()
        process.popen.wait()
    port = int(url.rpartition(":")[2])
    with gateway(tmp_path, replace(kit.usual_config(), port=port)) as process:
        assert process.url() == url
