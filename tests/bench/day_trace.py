"""A day of a model in minutes: quiet nights, a rising morning, two crowds. `python -m tests.bench.day_trace [SECONDS]`.

The real policy in the real Serve, behind the real gateway; the engine is a double that takes a few requests at a time
and a second for each, so that a fleet of six fits on two cores. Requests come when they would come (Poisson), whether
the last one was answered or not. A fixed fleet as large as the largest hour needs is what the replica-seconds are held
against. The policy's delays are its own, but for going down: a minute would be hours of this day; it is a 40th of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.bench.figure import Figure, above, below
from tests.doubles import clerk

from fastserve.cluster.access import new_key
from fastserve.cluster.gateway_process import GatewayProcess
from fastserve.cluster.home import Home
from fastserve.cluster.placements import targets_of
from fastserve.cluster.ray_head import Endpoint, RayHead
from fastserve.cluster.ray_serve import AppStatus, ServeApi, app_for, beginning
from fastserve.gateway.config import Key, Served
from fastserve.gateway.config import Revision as Route
from fastserve.gateway.keys import digest
from fastserve.plan.facts import LOCAL, Hardware, ModelFacts
from fastserve.plan.placement import Bounds
from fastserve.plan.revision import Revision
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve

SECONDS = 300.0
SERVICE_SECONDS = 1.0
SLOTS = 4
MOST = 6
TTFT_SECONDS = 2.0
QUIET_PER_S, PEAK_PER_S = 0.05, 11.0
REVISION = Revision("day", Stage.SOURCE, "k" * 64, "d" * 64, {})
SECTION = {"replicas": {"min": 1, "max": MOST}, "target": {"queue": 2, "ttft": f"{TTFT_SECONDS}s"}}
FACTS = ModelFacts(
    architecture="LlamaForCausalLM", parameters=10**6, weight_bytes=2 * 10**6, layers=2, hidden=64, intermediate=128,
    heads=2, kv_heads=1, head_dim=32, vocab=256, max_context=256, tied_embeddings=True, dtype="bfloat16",
)  # fmt: skip


def rate(hour: float) -> float:
    """Requests a second at an hour of the day: few until six, a plateau, crowds at ten and at eight in the evening."""
    day = max(0.0, math.sin((hour - 6) / 17 * math.pi)) if 6 <= hour <= 23 else 0.0
    crowds = sum(math.exp(-(((hour - at) / width) ** 2)) for at, width in ((10.0, 0.5), (20.0, 1.0)))
    return QUIET_PER_S + (0.35 * day + 0.65 * crowds) * PEAK_PER_S


def arrivals(seconds: float, seed: int = 0) -> list[float]:
    """When requests come, in seconds from midnight of the compressed day."""
    rng, now, found = random.Random(seed), 0.0, []
    most = max(rate(hour / 10) for hour in range(240))
    while now < seconds:
        now += rng.expovariate(most)
        if rng.random() < rate(now / seconds * 24) / most:
            found.append(now)
    return [at for at in found if at < seconds]


@dataclass
class Day:
    """What was seen of one day."""

    first_token_seconds: list[float] = field(default_factory=list)
    lost: int = 0
    replica_seconds: float = 0.0
    most_replicas: int = 0


class Fleet:
    """The serving of one home, tended in a thread as the beat tends it."""

    def __init__(self, home: Home, endpoint: Endpoint, down_seconds: float) -> None:
        self.api = ServeApi(endpoint.dashboard_url, endpoint.token)
        self.gateway, self.endpoint = GatewayProcess(home), endpoint
        self.key = new_key()
        self.port = self.gateway.choose_port(None)
        made = app_for(
            REVISION, Serve.model_validate(SECTION), "file:///nowhere", FACTS, Hardware(cpus=1, memory_bytes=2**32),
            Bounds(LOCAL, 1, MOST, ""),
        )  # fmt: skip
        self.app = clerk.app(made, SERVICE_SECONDS, SLOTS, most=2 * SLOTS)
        self.app["deployments"][0]["autoscaling_config"]["downscale_delay_s"] = down_seconds
        self.app["deployments"][0]["ray_actor_options"]["num_cpus"] = 0.1
        self.day = Day()
        self._over = threading.Event()
        self._tending = threading.Thread(target=self._tend)

    def start(self) -> None:
        self.api.put([beginning(self.app)], self.endpoint.serve_port)
        deadline = time.monotonic() + 120
        while not any(app.replicas for app in self.look().values()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no replica in 120 s: {self.api.get()}")
            time.sleep(0.2)
        self.gateway.start(self.port)
        self._tending.start()

    def stop(self) -> None:
        self._over.set()
        self._tending.join()
        self.gateway.stop()

    def look(self) -> dict[str, AppStatus]:
        apps = self.api.get()
        targets = targets_of("day", REVISION.digest, [LOCAL], apps, self.endpoint.serve_url)
        models = {"day": Served("generate", 0, (Route(REVISION.digest, 100, targets),))}
        self.gateway.configure(models, (Key("bench", digest(self.key), ("day",)),), self.port)
        return apps

    def _tend(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.5):
            held = sum(
                replica.state in ("STARTING", "RUNNING")
                for app in self.look().values()
                for deployment in (app.deployments or {}).values()
                for replica in deployment.replicas
            )
            now = time.monotonic()
            self.day.replica_seconds += held * (now - last)
            self.day.most_replicas = max(self.day.most_replicas, held)
            last = now


async def play(fleet: Fleet, times: list[float]) -> None:
    """Ask at these times."""
    began = time.monotonic()
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=200)
    url = f"http://127.0.0.1:{fleet.port}/v1/chat/completions"
    body: dict[str, Any] = {
        "model": "day", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {fleet.key}"}
    async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as client:

        async def ask(at: float) -> None:
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            due, first, ended = time.monotonic(), None, False
            try:
                async with client.stream("POST", url, json=body, headers=headers) as answer:
                    async for line in answer.aiter_lines():
                        if answer.status_code == 200 and line.startswith("data: {") and '"error"' not in line:
                            first = first or time.monotonic()
                        ended = ended or line == "data: [DONE]"
            except httpx.HTTPError:
                ended = False
            if first is None or not ended:
                fleet.day.lost += 1
            else:
                fleet.day.first_token_seconds.append(first - due)

        await asyncio.gather(*(ask(at) for at in times))


def run(seconds: float = SECONDS) -> Iterator[Figure]:
    """The figures of one day; as long as the day, and half a minute."""
    with tempfile.TemporaryDirectory(prefix="fastserve-day-") as folder, _importable(clerk.FOLDER):
        home = Home(Path(folder) / "home")
        home.create()
        head = RayHead(home.path)
        try:
            fleet = Fleet(home, head.start(), down_seconds=seconds / 40)
            fleet.start()
            times = arrivals(seconds)
            began = time.monotonic()
            try:
                asyncio.run(play(fleet, times))
            finally:
                fleet.stop()
            yield from _figures(fleet.day, len(times), time.monotonic() - began)
        finally:
            head.stop()


def _figures(day: Day, asked: int, seconds: float) -> Iterator[Figure]:
    waits = sorted(day.first_token_seconds)
    in_time = sum(wait <= TTFT_SECONDS for wait in waits) / max(1, asked)
    fixed = day.most_replicas * seconds
    yield Figure("day, requests", asked, "requests")
    yield Figure("day, requests lost", day.lost, "requests", "0", day.lost == 0)
    yield above(f"day, requests with a first token within {TTFT_SECONDS:g} s", in_time, "share", 0.9)
    yield Figure("day, time to first token, median", statistics.median(waits) if waits else math.inf, "s")
    yield Figure("day, most replicas", day.most_replicas, "replicas")
    yield below("day, replica-seconds against a fixed fleet of the peak", day.replica_seconds / fixed, "share", 0.7)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """PYTHONPATH with a folder in front while the block runs."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = before


if __name__ == "__main__":
    for figure in run(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS):
        sys.stdout.write(figure.line() + "\n")
        sys.stdout.flush()
