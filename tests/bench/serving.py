"""mlfq against first come first served, and against vLLM's priorities with lengths that nobody knows in practice.

Real engines of a small random model answer the same requests at the same time on the same cores: 80 % short answers of
8 to 32 tokens, 20 % long ones of 400 to 500, at random times, as many tokens as they can do in this very run. Loaded
in turn, whatever else the machine did meanwhile made more of a difference than the scheduler. The same mix in virtual
time, on vLLM's real scheduler without a model, shows it without noise.

What a queue shows depends on how many requests it has seen, and on how many tokens the draw asks for: with 80 requests,
or with a draw that asks for a tenth less, there is hardly a queue. So the draws are stretched in time to the load that
is meant, and the model is so small that a round has hundreds of requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.figure import Figure, above, below

ROOT = Path(__file__).parents[2]
KINDS = ("fcfs", "priority", "mlfq")
REQUESTS = 350
LONGEST_SECONDS = 120.0
"""A slow machine gets fewer requests near saturation, so that the round ends."""

QUIET_SECONDS = 40.0
SLOTS = 8
LONG = 400
NEAR = 0.97
"""Tokens that are asked for near saturation, as a share of what the engine can do with a full batch."""

SEED = 2
SEEDS = (1, 2, 3, 4)
"""In virtual time, taken together: single draws differ by a factor of two."""

VIRTUAL = (("near saturation", NEAR, 1000), ("below saturation", 0.5, 1000), ("KV blocks short", 0.9, 130))
"""Name, load, KV blocks."""

Row = list[Any]


def mix(seed: int, seconds: float, rate: float) -> list[Row]:
    """Requests as [at, prompt, tokens, 0]."""
    draw, at, rows = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        tokens = draw.randint(LONG, 500) if draw.random() < 0.2 else draw.randint(8, 32)
        rows.append([at, [draw.randint(10, 250) for _ in range(draw.randint(16, 128))], tokens, 0])
    return rows


MEAN_TOKENS = 0.8 * 20 + 0.2 * 450


def loaded(seed: int, requests: int, tokens_per_s: float) -> list[Row]:
    """The mix, so many requests, stretched in time until they ask for so many tokens a second."""
    rows = mix(seed, 2.0 * requests, 1.0)[:requests]
    stretch = sum(row[2] for row in rows) / tokens_per_s / rows[-1][0]
    return [[at * stretch, prompt, tokens, 0] for at, prompt, tokens, _ in rows]


def full_batch() -> list[Row]:
    """As many answers of one length as there are slots, twice: the batch is full to the end."""
    return [[0.0, prompt, 100, 0] for _, prompt, _, _ in mix(0, 100.0, 1.0)[: 2 * SLOTS]]


def hinted(rows: list[Row]) -> list[Row]:
    """With the true length as the priority: the best that vLLM's own policy can do."""
    return [[at, prompt, tokens, tokens] for at, prompt, tokens, _ in rows]


class Engine:
    """A process with one engine."""

    def __init__(self, kind: str, model: Path) -> None:
        self.kind = kind
        section = {
            "scheduler": kind,
            "context": 1024,
            "engine": {"maxSequences": SLOTS, "kvCache": "256MiB", "dtype": "float32"},
        }
        command = [sys.executable, "-m", "tests.bench.serving_engine", str(model), json.dumps(section)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, env=dict(os.environ), **pipes)  # type: ignore[call-overload]

    def up(self) -> None:
        self._line("up")

    def _line(self, wanted: str) -> str:
        """The next line that begins so; vLLM writes some of its own."""
        for line in self.process.stdout:
            if line.startswith(wanted):
                return str(line)
        raise RuntimeError(f"the {self.kind} engine has ended")

    def play(self, rows: list[Row]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(hinted(rows) if self.kind == "priority" else rows) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line('{"rows"'))
        return found

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def together(found: dict[str, Engine], rows: list[Row]) -> dict[str, dict[str, Any]]:
    """One round of all engines at the same time."""
    with ThreadPoolExecutor(len(found)) as pool:
        return dict(zip(found, pool.map(lambda engine: engine.play(rows), found.values()), strict=True))


@contextlib.contextmanager
def engines(folder: Path) -> Iterator[dict[str, Engine]]:
    sys.path.insert(0, str(ROOT / "tests" / "doubles"))
    from tiny_llama import write_tiny_llama

    model = write_tiny_llama(folder / "model", layers=4, hidden=128)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    found: dict[str, Engine] = {}
    try:
        for kind in KINDS:
            found[kind] = Engine(kind, model)
        for engine in found.values():
            engine.up()
        yield found
    finally:
        for engine in found.values():
            engine.stop()


def rate(rounds: Sequence[dict[str, Any]]) -> float:
    """Tokens/s."""
    return sum(tokens for one in rounds for _, _, tokens in one["rows"]) / sum(one["seconds"] for one in rounds)


def figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    rows = [row for one in rounds for row in one["rows"]]
    return {
        "first": statistics.mean(first for first, _, _ in rows),
        "normalised": statistics.mean(last / tokens for _, last, tokens in rows),
        "mean": statistics.mean(last for _, last, _ in rows),
        "long": statistics.mean(last for _, last, tokens in rows if tokens >= LONG),
        "rate": rate(rounds),
    }


def compared(name: str, before: dict[str, float], after: dict[str, float]) -> Iterator[Figure]:
    """mlfq (`after`) against another policy, where requests wait."""
    yield above(f"{name}: time to first token, how many times lower", before["first"] / after["first"], "x", 20)
    times = before["normalised"] / after["normalised"]
    yield above(f"{name}: latency for each token, how many times lower", times, "x", 4)
    yield above(f"{name}: mean completion, how many times lower", before["mean"] / after["mean"], "x", 1.3)
    yield above(f"{name}: tokens/s, against it", after["rate"] / before["rate"], "x", 0.98)
    yield below(f"{name}: long requests, how many times slower", after["long"] / before["long"], "x", 1.4)


def no_worse(name: str, before: dict[str, float], after: dict[str, float]) -> Iterator[Figure]:
    """The same where hardly anybody waits: nobody loses more than the scheduler's own work and noise."""
    yield above(f"{name}: time to first token, how many times lower", before["first"] / after["first"], "x", 0.95)
    yield above(f"{name}: mean completion, how many times lower", before["mean"] / after["mean"], "x", 0.97)
    yield below(f"{name}: long requests, how many times slower", after["long"] / before["long"], "x", 1.05)


def perfect(name: str, hints: dict[str, float], after: dict[str, float]) -> Figure:
    """mlfq against vLLM's priorities with the true lengths."""
    times = hints["normalised"] / after["normalised"]
    return above(f"{name}, perfect hints: latency for each token, how many times lower", times, "x", 1.5)


def real() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder, engines(Path(folder)) as found:
        can = min(rate([one]) for one in together(found, full_batch()).values())
        yield Figure("real engines: tokens/s of each with a full batch", can, "tokens/s")
        # All at once: the answers that mlfq learns its quantum from.
        warm = together(found, [[0.0, *row[1:]] for row in mix(0, 48.0, 1.0)])
        requests = int(min(REQUESTS, LONGEST_SECONDS * NEAR * can / MEAN_TOKENS))
        yield Figure("real engines near saturation: requests", requests, "")
        near = together(found, loaded(SEED, requests, NEAR * can))
        each = {kind: figures([one]) for kind, one in near.items()}
        yield from compared("real engines near saturation, fcfs", each["fcfs"], each["mlfq"])
        yield perfect("real engines near saturation", each["priority"], each["mlfq"])
        low = together(found, loaded(9, max(10, int(QUIET_SECONDS * 0.4 * can / MEAN_TOKENS)), 0.4 * can))
        quiet = {kind: figures([one]) for kind, one in low.items()}
        yield from no_worse("real engines at 40 % load, fcfs", quiet["fcfs"], quiet["mlfq"])
        pairs = [
            one == other
            for round_ in (warm, near, low)
            for one, other in zip(round_["fcfs"]["ids"], round_["mlfq"]["ids"], strict=True)
        ]
        same = sum(pairs) / len(pairs)
        yield Figure(f"real engines: share of {len(pairs)} greedy answers that are equal", same, "", "1", same == 1)


def virtual() -> Iterator[Figure]:
    sys.path.insert(0, str(ROOT / "tests" / "doubles"))
    from tiny_llama import write_tiny_llama
    from virtual_engine import Asked, VirtualEngine, make_scheduler

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_llama(Path(folder) / "model")

        def play(kind: str, rows: list[Row], blocks: int) -> dict[str, Any]:
            engine = VirtualEngine(make_scheduler(model, kind, slots=SLOTS, blocks=blocks, block_size=32))
            given = hinted(rows) if kind == "priority" else rows
            answers = engine.run(Asked(f"{n:05}", *row) for n, row in enumerate(given)).values()
            measured = [[one.first, one.seconds, len(one.tokens)] for one in answers]
            return {"rows": measured, "seconds": engine.now}

        can = rate([play("fcfs", full_batch(), 1000)])
        for title, load, blocks in VIRTUAL:
            rounds: dict[str, list[dict[str, Any]]] = {
                kind: [play(kind, loaded(seed, REQUESTS, load * can), blocks) for seed in SEEDS] for kind in KINDS
            }
            each = {kind: figures(found) for kind, found in rounds.items()}
            if load < 0.7:
                yield from no_worse(f"virtual time, {title}, fcfs", each["fcfs"], each["mlfq"])
                continue
            yield from compared(f"virtual time, {title}, fcfs", each["fcfs"], each["mlfq"])
            yield perfect(f"virtual time, {title}", each["priority"], each["mlfq"])


def run() -> Iterator[Figure]:
    yield from virtual()
    yield from real()
