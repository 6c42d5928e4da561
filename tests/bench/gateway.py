"""What the gateway costs against a direct connection: both are asked in one run, in turn, on one machine.

Processor time a token is the honest figure on a busy machine; times to first token are differences within the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psutil
import uvloop
from tests.bench.figure import Figure, above, below

from fastserve.gateway.config import Config, Key, Revision, Served, Target, write
from fastserve.gateway.keys import digest, new_key

STREAMS = 32
GAP_MICROSECONDS = 20_000
TOKENS = 250
PROBES = 150
HERE = Path(__file__).parent


class Client(asyncio.Protocol):
    """Asks once and counts events; a protocol of its own so that the load costs little beside what it loads."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self._end = b""
        self.events = 0
        self.first_seconds = 0.0
        self._started = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._started = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, fresh: bytes) -> None:
        if not self.first_seconds and b"data:" in fresh:
            self.first_seconds = time.perf_counter() - self._started
        # Four bytes of what came before: too few to count an event twice, enough to see one that was cut.
        data = self._tail + fresh
        self.events += data.count(b"data:")
        self._tail = data[-4:]
        self._end = (self._end + fresh)[-7:]
        if self._end == b"\r\n0\r\n\r\n":
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Side:
    """One way to the engine: straight, or through the gateway."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key

    async def ask(self, tokens: int, gap_microseconds: int) -> Client:
        asked = {
            "model": "bench",
            "stream": True,
            "max_tokens": tokens,
            "seed": gap_microseconds,
            "messages": [{"role": "user", "content": "Why is the sky blue? " * 10}],
        }
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: Client(head.encode() + body), "127.0.0.1", self._port)
        await client.done
        if client.events != tokens + 1:
            raise RuntimeError(f"{client.events} events came of {tokens + 1}")
        return client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(port: int, *command: str) -> Iterator[tuple[psutil.Process, float]]:
    """A process and the seconds until it listened on `port`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.perf_counter() - started > 30:
                raise RuntimeError(f"{command} does not listen on port {port}")
            time.sleep(0.005)
        yield psutil.Process(process.pid), time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(timeout=20)


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _paced(side: Side) -> int:
    clients = await asyncio.gather(*(side.ask(TOKENS, GAP_MICROSECONDS) for _ in range(STREAMS)))
    return sum(client.events for client in clients)


async def _probe(direct: Side, through: Side) -> tuple[list[float], list[float]]:
    """Times to first token in milliseconds, asked in turn while 8 streams run through the gateway."""
    load = [asyncio.create_task(through.ask(TOKENS, GAP_MICROSECONDS)) for _ in range(8)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(PROBES):
        for side, found in zip((direct, through), times, strict=True):
            found.append((await side.ask(1, 0)).first_seconds * 1000)
            await asyncio.sleep(0.005)
    await asyncio.gather(*load)
    return times


async def _fast(side: Side) -> float:
    """Tokens a second of 4 streams as fast as they go."""
    started = time.perf_counter()
    clients = await asyncio.gather(*(side.ask(2000, 0) for _ in range(4)))
    return sum(client.events for client in clients) / (time.perf_counter() - started)


async def _measure(engine: psutil.Process, gateway: psutil.Process, direct: Side, through: Side) -> list[Figure]:
    await through.ask(10, 0)
    before = processor_seconds(engine)
    events = await _paced(direct)
    engine_cost = (processor_seconds(engine) - before) / events * 1e6
    before = processor_seconds(gateway)
    events = await _paced(through)
    cost = (processor_seconds(gateway) - before) / events * 1e6
    straight, passed = await _probe(direct, through)
    rates = [(await _fast(direct), await _fast(through)) for _ in range(3)]
    added_p50 = statistics.median(passed) - statistics.median(straight)
    added_p99 = statistics.quantiles(passed, n=100)[98] - statistics.quantiles(straight, n=100)[98]
    return [
        below("gateway.cpu_per_streamed_token", cost, "us", 70),
        Figure("gateway.cpu_per_streamed_token.engine_beside", engine_cost, "us"),
        below("gateway.added_ttft_p50", added_p50, "ms", 3),
        below("gateway.added_ttft_p99", added_p99, "ms", 25),
        above("gateway.tokens_per_s", statistics.median(rate for _, rate in rates), "tokens/s", 5000),
        above("gateway.tokens_per_s_share_of_direct", statistics.median(b / a for a, b in rates), "share", 0.5),
        below("gateway.memory_rss", gateway.memory_info().rss / 1e6, "MB", 80),
    ]


def run() -> list[Figure]:
    """All figures of the gateway; under a minute."""
    key = new_key()
    engine_port, port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            port=port,
            models={
                "bench": Served("generate", 0, (Revision("0" * 64, 1, (Target(f"http://127.0.0.1:{engine_port}"),)),))
            },
            keys=(Key("bench", digest(key), ("bench",)),),
        )
        file = Path(folder) / "gateway.json"
        write(file, config)
        gateway_command = (sys.executable, "-m", "fastserve.gateway", "--config", str(file))
        starts = []
        for _ in range(3):
            with running(port, *gateway_command) as (_, seconds):
                starts.append(seconds)
        upstream = running(engine_port, sys.executable, str(HERE / "stream_upstream.py"), str(engine_port))
        with upstream as (engine, _), running(port, *gateway_command) as (gateway, _):
            figures = uvloop.run(_measure(engine, gateway, Side(engine_port, key), Side(port, key)))
    return [*figures, below("gateway.start", statistics.median(starts), "s", 1.5)]


if __name__ == "__main__":
    for figure in run():
        sys.stdout.write(figure.line() + "\n")
