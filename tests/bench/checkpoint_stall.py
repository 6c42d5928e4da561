"""What a checkpoint costs the step path when the store is slow: steps beside a save against steps without one.

The stall is the time in the call of `save` plus the CPU time of the thread behind it: what the thread takes away from
the computing where a rank has one core. Windows of equally many steps, with a save and without, take turns; the
difference of their wall times is told besides: it holds the same, and all other work on the machine.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_models as models
from ranks import run_ranks
from slow_stores import slow_store
from tests.bench.figure import Figure, below

from fastserve.plan.stages import Stage, StageRequest
from fastserve.stages.train.group import Group
from fastserve.stages.train.saving import Saver
from fastserve.stages.train.shard import Sharded
from fastserve.stages.train.state import RunState

SECONDS_PER_PUT = 2.0
SHARES = (1, 2)
COUNTS = (4, 8)
"""Samples of 63 trained tokens of each rank."""

ROUNDS = 3
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
}
"""5.1 M parameters: 62 MB of parameters and moments."""

_PUTS = 4
"""One after the other on the first rank: slices, what they are, facts, marker."""


def rows() -> Iterator[Figure]:
    """Figures of two ranks at shares 1:2; about two minutes."""
    with tempfile.TemporaryDirectory() as folder:
        told = run_ranks(lambda: _rank(Path(folder)), len(SHARES), timeout=500)
    # A step is over when the slowest rank is through.
    worst = {name: max(row[name] for row in told) for name in told[0]}
    step = worst["step"]
    name = f"checkpoint, store of {SECONDS_PER_PUT:g} s a put"
    yield below(f"{name}: stall in the step path", (worst["call"] + worst["cpu"]) / step, "steps", 1.0)
    yield Figure(f"{name}: of it in the call of save", worst["call"] / step, "steps")
    yield Figure(f"{name}: difference in wall time", worst["wall"] / step, "steps")
    yield Figure(f"{name}: stall if the steps waited", worst["whole"] / step, "steps")
    yield Figure(f"{name}: a step without a save", step, "s")


def _rank(folder: Path) -> dict[str, float]:
    """Seconds: of a step; of a save's call, of its thread's CPU, what it adds to wall time, and until it counts."""
    group = Group.current()
    engine = Sharded(models.full("llama", **MODEL), SHARES, group)
    request = StageRequest("m", Stage.TRAIN, "a" * 64, 1, {})
    saver = _Timed(slow_store(folder / "store", SECONDS_PER_PUT), request, group, keep=2)
    batch = models.samples(sum(COUNTS), length=64)
    mine = models.micro_batches(batch, [COUNTS], group.rank)

    def window(number: int, count: int) -> tuple[float, float, float]:
        """Seconds: of the window, in the call of save (none for number 0), and of its thread's CPU."""
        group.number_from_first(0)  # begin together
        began = time.perf_counter()
        if number:
            saver.save(engine.state(), RunState(number))
        called = time.perf_counter() - began
        for _ in range(count):
            engine.clear()
            models.accumulate(engine, mine)
            engine.scale(1 / models.trained_tokens(batch))
            engine.step(1e-4, 1.0)
            saver.check()
        took = time.perf_counter() - began
        saver.wait()
        return took, called, saver.cpu_seconds

    window(1, 3)  # the first save also makes its buffers
    # Enough steps to outlast the save.
    count = group.number_from_first(int((_PUTS + 1) * SECONDS_PER_PUT / (window(0, 4)[0] / 4)) + 1)
    quiet = [window(0, count)]
    saving, whole = [], []
    for number in range(2, ROUNDS + 2):
        saving.append(window(number, count))
        quiet.append(window(0, count))
    for number in range(ROUNDS + 2, ROUNDS + 4):
        began = time.perf_counter()
        saver.save(engine.state(), RunState(number))
        saver.wait()
        whole.append(time.perf_counter() - began)
    saver.close()
    around = [(before[0] + after[0]) / 2 for before, after in itertools.pairwise(quiet)]
    return {
        "step": statistics.median(seconds for seconds, _, _ in quiet) / count,
        "wall": statistics.median(one[0] - calm for one, calm in zip(saving, around, strict=True)),
        "call": statistics.median(called for _, called, _ in saving),
        "cpu": statistics.median(cpu for _, _, cpu in saving),
        "whole": min(whole),
    }


class _Timed(Saver):
    """Knows the CPU seconds of its last save's thread."""

    cpu_seconds = 0.0

    def _work(self, job: Any) -> None:
        super()._work(job)
        self.cpu_seconds = time.thread_time()
