"""The whole path (gateway and replica) against bare vLLM, at 1, 8 and 32 streams, and the path by Serve's proxy.

The same model with the same engine arguments and environment, one engine behind `fastserve up`, one in `vllm serve`;
each is loaded in turn, in several rounds. Ratios are those of the same rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import uvloop
from tests.bench.figure import Figure, above, below
from tests.bench.serving_home import SMOLLM2, Served, ask, bare, endpoint_of, random_llama, served

from fastserve.cluster.access import gateway_keys
from fastserve.cluster.processes import free_port
from fastserve.cluster.ray_serve import route_prefix
from fastserve.gateway.config import Config, Revision, Target, write
from fastserve.gateway.config import Served as Routed

SERVE = "{context: 512, engine: {maxSequences: 32, kvCache: 256MiB}}"
ROUNDS = 4
BY_PROXY = "by Serve's proxy"
REQUESTS = {1: 4, 8: 2, 32: 1}
"""Requests of each stream in one round, by the number of streams."""


@contextlib.contextmanager
def by_proxy(found: Served, folder: Path) -> Iterator[int]:
    """A gateway that knows Serve's proxy alone; its port."""
    endpoint, port = endpoint_of(found.home), free_port()
    (revision,) = found.home.serving().values()
    url = endpoint.serve_url + route_prefix("bench", revision.digest, "local")
    models = {"bench": Routed("generate", 0, (Revision(revision.digest, 100, (Target(url),)),))}
    write(folder / "config.json", Config(port=port, models=models, keys=gateway_keys(found.home)))
    process = subprocess.Popen(
        [sys.executable, "-m", "fastserve.gateway", "--config", str(folder / "config.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(2)
        yield port
    finally:
        process.terminate()
        process.wait(20)


async def load(port: int, key: str, streams: int, tokens: int) -> tuple[list[float], float]:
    """Times to first token in milliseconds, and tokens/s."""

    async def stream() -> list[float]:
        return [1000 * await ask(port, key, tokens) for _ in range(REQUESTS[streams])]

    began = time.perf_counter()
    first = [value for one in await asyncio.gather(*(stream() for _ in range(streams))) for value in one]
    return first, len(first) * tokens / (time.perf_counter() - began)


def measured(found: Served, tokens: int) -> dict[tuple[str, int], list[tuple[list[float], float]]]:
    """Rounds by way and number of streams."""
    rows: dict[tuple[str, int], list[tuple[list[float], float]]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as folder,
        bare(found, found.env) as (port, _),
        by_proxy(found, Path(folder)) as proxy,
    ):
        ways = [("bare", port), ("whole path", found.port), (BY_PROXY, proxy)]
        for number in range(-1, ROUNDS):
            for streams in REQUESTS:
                for name, at in ways:
                    if name == BY_PROXY and number > 0:
                        continue  # slow, and shown only for comparison
                    row = uvloop.run(load(at, found.key, streams, tokens if number >= 0 else 8))
                    if number >= 0:  # the first round warms up
                        rows[name, streams].append(row)
            ways = ways[1:] + ways[:1]
    return rows


def run() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        for title, source, tokens, least in (
            ("random model of 3 M", random_llama(Path(folder) / "model"), 96, {8: 0.9}),
            ("SmolLM2", SMOLLM2, 32, {1: 0.95, 8: 0.95, 32: 0.95}),
        ):
            with served(source, SERVE) as found:
                rows = measured(found, tokens)
            yield from _figures(title, rows, least)


def _figures(
    title: str, rows: dict[tuple[str, int], list[tuple[list[float], float]]], least: dict[int, float]
) -> Iterator[Figure]:
    def first(name: str, streams: int) -> float:
        return statistics.median(value for values, _ in rows[name, streams] for value in values)

    for name in ("whole path", BY_PROXY):
        for streams in REQUESTS:
            label = f"{title}, {streams} streams, {name}"
            extra = first(name, streams) - first("bare", streams)
            aim = streams == 1 and name == "whole path"
            pairs = zip(rows[name, streams], rows["bare", streams], strict=False)
            kept = statistics.median(ours / bares for (_, ours), (_, bares) in pairs)
            time_label, kept_label = f"{label}: TTFT p50 over bare vLLM", f"{label}: tokens/s of bare vLLM's"
            yield below(time_label, extra, "ms", 5) if aim else Figure(time_label, extra, "ms")
            limit = least.get(streams) if name == "whole path" else None
            yield Figure(kept_label, kept, "") if limit is None else above(kept_label, kept, "", limit)
    for streams in REQUESTS:
        yield Figure(f"{title}, {streams} streams, bare: TTFT p50", first("bare", streams), "ms")
        rate = statistics.mean(rate for _, rate in rows["bare", streams])
        yield Figure(f"{title}, {streams} streams, bare: tokens/s", rate, "tokens/s")
