"""From no replica to the first token, through the whole path, and what it is made of; `vllm serve` beside it.

A plain start is `vllm serve` as it is installed, with bytecode, with the very arguments of the served engine. Both are
started in turn in one run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.bench.figure import Figure, above
from tests.bench.serving_home import Served, bare, endpoint_of, first_event, random_llama, served

from fastserve.cluster.ray_serve import ServeApi

ROUNDS = 2
SERVE = "{context: 512, engine: {maxSequences: 8, kvCache: 256MiB}, replicas: {min: 0, max: 1, idle: 2s}}"
ZERO_SECONDS = 90.0
_MARKS = (
    ("imports of the server", "non-default args"),
    ("imports of the engine's process", "Initializing a V1 LLM engine"),
    ("weights and engine", "init engine (profile"),
    ("server up and first token", "first token"),
)
"""Parts of a plain start, each with a word of vLLM's log at its end."""


def from_zero(found: Served) -> tuple[float, Mapping[str, float]]:
    """Seconds from a request at no replica to its first token, and of them the replica's own parts."""
    endpoint = endpoint_of(found.home)
    api = ServeApi(endpoint.dashboard_url, endpoint.token)
    deadline = time.monotonic() + ZERO_SECONDS
    while any(
        replica for app in api.get().values() for item in (app.deployments or {}).values() for replica in item.replicas
    ):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the replica does not go: {api.get()}")
        time.sleep(0.2)
    began = time.monotonic()
    if not first_event(found.port, found.key):
        raise RuntimeError("the request at no replica was not answered")
    seconds = time.monotonic() - began
    import json

    (path,) = (endpoint.temp_dir / "engines").glob("*.json")
    parts: dict[str, float] = json.loads(path.read_text())["seconds"]
    return seconds, parts


def plain(found: Served, env: Mapping[str, str]) -> tuple[float, dict[str, float]]:
    """Seconds from `vllm serve` to its first token, and their parts."""
    with bare(found, env) as (_, said):
        total = said[-1][0]
        parts, last = {}, 0.0
        for name, word in _MARKS:
            at = next((at for at, line in said if word in line), None)
            if at is not None:
                parts[name], last = at - last, at
    return total, parts


def run() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder, served(random_llama(Path(folder) / "model"), SERVE) as found:
        ours, theirs, same = [], [], []
        for _ in range(ROUNDS):
            ours.append(from_zero(found))
            theirs.append(plain(found, {}))
        same.append(plain(found, found.env))
        yield from _shown("0 to 1", ours)
        yield from _shown("vllm serve", theirs)
        yield from _shown("vllm serve, with the same environment", same)
        times = statistics.mean(total for total, _ in theirs) / statistics.mean(total for total, _ in ours)
        yield above("0 to 1: first token, how many times sooner than vllm serve", times, "x", 3)


def _shown(name: str, rounds: list[tuple[float, Mapping[str, float]]]) -> Iterator[Figure]:
    yield Figure(f"{name}: to the first token", statistics.mean(total for total, _ in rounds), "s")
    for part in rounds[0][1]:
        yield Figure(f"{name}: {part}", statistics.mean(parts.get(part, 0.0) for _, parts in rounds), "s")
