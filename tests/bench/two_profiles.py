"""Two replicas, one of them three times as slow, behind the gateway: `python -m tests.bench.two_profiles`.

Two plain vLLM servers with a small random model, held to 0.9 and 0.3 cores by CPU quota. The gateway fills the
slots of the first, then those of the second; beside it stands what even turns give (one request to each in turn, by the
client).
Solos, pair and turns take turns themselves, so that all see the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from tests.bench.cgroup import NoQuotas, Quotas
from tests.bench.figure import Figure, above

from fastserve.artifacts.describe import describe
from fastserve.cluster.access import new_key
from fastserve.cluster.processes import clean_environment, free_ports
from fastserve.gateway.config import Config, Key, Served, Target, write
from fastserve.gateway.config import Revision as Route
from fastserve.gateway.keys import digest
from fastserve.plan.engine import engine_args, engine_env
from fastserve.plan.facts import Hardware
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve

CORES = {"fast": 0.9, "slow": 0.3}
SLOTS = 8
CLIENTS = 2 * SLOTS
"""As many as both solos have together: a batch that is not full makes an engine of this size slower."""

TOKENS = 48
ROUND_SECONDS = 12.0
ROUNDS = 2
MACHINE = Hardware(cpus=1, memory_bytes=2 * 2**30)
SECTION = {"context": 512, "engine": {"maxSequences": SLOTS, "kvCache": "64MiB"}}


def model_at(folder: Path) -> Path:
    """A Llama of some millions of random numbers, with a real tokenizer."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
    from tiny import tiny_model

    return tiny_model(folder)


@contextlib.contextmanager
def server(model: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM's own server with the planner's arguments."""
    serve = Serve.model_validate(SECTION)
    revision = Revision("pair", Stage.SOURCE, "k" * 64, "d" * 64, deciding(serve))
    environment = engine_env(revision, MACHINE) | {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--host=127.0.0.1", f"--port={port}",
        "--disable-uvicorn-access-log", *engine_args(revision, describe(model), MACHINE),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=clean_environment(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.kill()
        process.wait()


def await_answer(url: str, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer (code {process.poll()})")


async def load(urls: list[str], name: str, headers: dict[str, str], clients: int) -> float:
    """Tokens a second of a closed loop: each client asks again as soon as it is answered. urls: in turn."""
    turns = itertools.cycle(urls)
    body = {"model": name, "prompt": "one two three four", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    began = time.monotonic()
    warm, end = began + ROUND_SECONDS / 4, began + ROUND_SECONDS
    ended: list[tuple[float, float]] = []

    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:

        async def ask() -> None:
            while (asked := time.monotonic()) < end:
                answer = await client.post(next(turns) + "/completions", json=body, headers=headers)
                answer.raise_for_status()
                assert answer.json()["usage"]["completion_tokens"] == TOKENS
                ended.append((asked, time.monotonic()))

        await asyncio.gather(*(ask() for _ in range(clients)))
    # Each answer counts with the part of its time that lies in the window.
    shares = (max(0.0, min(last, end) - max(first, warm)) / (last - first) for first, last in ended)
    return sum(shares) * TOKENS / (end - warm)


def run() -> Iterator[Figure]:
    """The figures; about three minutes, most of it the start of two engines."""
    try:
        with Quotas() as quotas, tempfile.TemporaryDirectory(prefix="fastserve-pair-") as folder:
            yield from _measured(quotas, Path(folder))
    except NoQuotas as error:
        sys.stderr.write(f"two profiles: {error}\n")


def _measured(quotas: Quotas, folder: Path) -> Iterator[Figure]:
    model = model_at(folder / "model")
    names = list(CORES)
    ports = free_ports(2 + 3)
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server(model, port)) for name, port in zip(names, ports, strict=False)}
        urls = {name: f"http://127.0.0.1:{port}" for name, port in zip(names, ports, strict=False)}
        for name, process in servers.items():
            await_answer(urls[name] + "/health", process)
        key = new_key()
        gateways = {
            kind: stack.enter_context(gateway(folder, port, [urls[name] for name in those], key))
            for (kind, those), port in zip(
                {"fast": ["fast"], "slow": ["slow"], "pair": names}.items(), ports[2:], strict=True
            )
        }
        for name, process in servers.items():
            quotas.limit(name, CORES[name])
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                quotas.join(name, member.pid)
        yield from _figures(gateways, urls, {"Authorization": f"Bearer {key}"})


def _figures(gateways: dict[str, str], urls: dict[str, str], headers: dict[str, str]) -> Iterator[Figure]:
    found: dict[str, list[float]] = {"fast": [], "slow": [], "pair": [], "even": []}
    for _ in range(ROUNDS):
        for kind in ("fast", "slow"):
            found[kind].append(asyncio.run(load([gateways[kind] + "/v1"], "pair", headers, SLOTS)))
        found["pair"].append(asyncio.run(load([gateways["pair"] + "/v1"], "pair", headers, CLIENTS)))
        found["even"].append(asyncio.run(load([url + "/v1" for url in urls.values()], "pair", {}, CLIENTS)))
    for kind, rates in found.items():
        yield Figure(f"two profiles, {kind}", statistics.median(rates), "tokens/s")
    sums = [fast + slow for fast, slow in zip(found["fast"], found["slow"], strict=True)]
    share = statistics.median(pair / total for pair, total in zip(found["pair"], sums, strict=True))
    even = statistics.median(turns / total for turns, total in zip(found["even"], sums, strict=True))
    yield above("two profiles, pair against the sum of the solos", share, "share", 0.9)
    yield Figure("two profiles, even turns against the sum of the solos", even, "share")


@contextlib.contextmanager
def gateway(folder: Path, port: int, urls: list[str], key: str) -> Iterator[str]:
    """The real gateway in front of some servers: each of a profile of its own, in the order of `serve.profiles`."""
    targets = tuple(Target(url, SLOTS, rank=place) for place, url in enumerate(urls))
    models = {"pair": Served("generate", 0, (Route("0" * 64, 1, targets),))}
    file = folder / f"gateway-{port}.json"
    write(file, Config(port=port, models=models, keys=(Key("bench", digest(key), ("pair",)),)))
    process = subprocess.Popen(
        [sys.executable, "-m", "fastserve.gateway", "--config", str(file)], env=clean_environment({}),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=os.fspath(folder),
    )  # fmt: skip
    try:
        await_answer(f"http://127.0.0.1:{port}/healthz", process, 30)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    for figure in run():
        sys.stdout.write(figure.line() + "\n")
        sys.stdout.flush()
