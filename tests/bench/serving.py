"""mlfq against first come first served, and against vLLM's priorities with lengths that nobody knows in practice.

Real engines of a small random model answer the same requests at the same time on the same cores: 80 % short answers of
8 to 32 tokens, 20 % long ones of 400 to 500, at random times, near what they can do in this very run. Loaded in turn,
whatever else the machine did meanwhile made more of a difference than the scheduler. The same mix in virtual time, on
vLLM's real scheduler without a model, shows it without noise.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.figure import Figure, above, below

ROOT = Path(__file__).parents[2]
KINDS = ("fcfs", "priority", "mlfq")
ROUND_SECONDS = 75.0
QUIET_SECONDS = 40.0
SLOTS = 8
LONG = 400
NEAR = 0.95
"""Share of what the engine can do that is asked for near saturation."""

Row = list[Any]


def mix(seed: int, seconds: float, rate: float) -> list[Row]:
    """Requests as [at, prompt, tokens, 0]."""
    draw, at, rows = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        tokens = draw.randint(LONG, 500) if draw.random() < 0.2 else draw.randint(8, 32)
        rows.append([at, [draw.randint(10, 250) for _ in range(draw.randint(16, 128))], tokens, 0])
    return rows


MEAN_TOKENS = 0.8 * 20 + 0.2 * 450


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

    model = write_tiny_llama(folder / "model", layers=8, hidden=384)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    found: dict[str, Engine] = {}
    try:
        for kind in KINDS:
            found[kind] = Engine(kind, model)
        yield found
    finally:
        for engine in found.values():
            engine.stop()


def figures(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    rows = [row for one in rounds for row in one["rows"]]
    return {
        "first": statistics.mean(first for first, _, _ in rows),
        "normalised": statistics.mean(last / tokens for _, last, tokens in rows),
        "mean": statistics.mean(last for _, last, _ in rows),
        "long": statistics.mean(last for _, last, tokens in rows if tokens >= LONG),
        "rate": sum(tokens for _, _, tokens in rows) / sum(one["seconds"] for one in rounds),
    }


def compared(name: str, before: dict[str, float], after: dict[str, float], aims: bool = True) -> Iterator[Figure]:
    """mlfq (`after`) against another policy."""

    def show(what: str, value: float, limit: float, kind: Callable[..., Figure] = above) -> Figure:
        return kind(f"{name}: {what}", value, "x", limit) if aims else Figure(f"{name}: {what}", value, "x")

    yield show("time to first token, how many times lower", before["first"] / after["first"], 20)
    yield show("latency for each token, how many times lower", before["normalised"] / after["normalised"], 4)
    yield show("mean completion, how many times lower", before["mean"] / after["mean"], 1.3)
    yield show("tokens/s, against it", after["rate"] / before["rate"], 0.98)
    yield show("long requests, how many times slower", after["long"] / before["long"], 1.4, below)


def real() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder, engines(Path(folder)) as found:
        # All at once: what the engines can do, and the answers that mlfq learns its quantum from.
        warm = together(found, [[0.0, *row[1:]] for row in mix(0, 24.0, 1.0)])
        can = min(figures([one])["rate"] for one in warm.values())
        yield Figure("real engines: tokens/s of each with a full batch", can, "tokens/s")
        near = together(found, mix(1, ROUND_SECONDS, NEAR * can / MEAN_TOKENS))
        each = {kind: figures([one]) for kind, one in near.items()}
        yield from compared("real engines near saturation, fcfs", each["fcfs"], each["mlfq"])
        hints = each["priority"]["normalised"] / each["mlfq"]["normalised"]
        yield above("real engines near saturation, perfect hints: latency for each token, times lower", hints, "x", 1.5)
        low = together(found, mix(9, QUIET_SECONDS, 0.4 * can / MEAN_TOKENS))
        quiet = {kind: figures([one]) for kind, one in low.items()}
        times = quiet["fcfs"]["mean"] / quiet["mlfq"]["mean"]
        yield above("real engines at 40 % load, fcfs: mean completion, times lower", times, "x", 0.98)
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
        for title, rate, blocks in (("near saturation", 5.4, 1000), ("KV blocks short", 5.0, 130)):
            rounds: dict[str, list[dict[str, Any]]] = {"fcfs": [], "priority": [], "mlfq": []}
            for seed in (1, 2):
                rows = mix(seed, 60.0, rate)
                for kind, found in rounds.items():
                    engine = VirtualEngine(make_scheduler(model, kind, slots=SLOTS, blocks=blocks, block_size=32))
                    given = hinted(rows) if kind == "priority" else rows
                    answers = engine.run(Asked(f"{n:05}", *row) for n, row in enumerate(given)).values()
                    measured = [[one.first, one.seconds, len(one.tokens)] for one in answers]
                    found.append({"rows": measured, "seconds": engine.now})
            each = {kind: figures(found) for kind, found in rounds.items()}
            yield from compared(f"virtual time, {title}, fcfs", each["fcfs"], each["mlfq"])
            hints = each["priority"]["normalised"] / each["mlfq"]["normalised"]
            yield above(f"virtual time, {title}, perfect hints: latency for each token, times lower", hints, "x", 1.5)


def run() -> Iterator[Figure]:
    yield from virtual()
    yield from real()
