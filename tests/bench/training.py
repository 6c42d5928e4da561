"""Training on unequal workers: speed, exactness, memory, re-planning, checkpoints, whole runs.

Workers are processes of this machine on CPU quotas. Everything that a figure compares runs side by side or in turn in
the same run; how, each module says. Where no quotas can be set, the figures that need them are left out by name.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tests.bench.cgroup import why_no_quotas
from tests.bench.figure import Figure

if TYPE_CHECKING:
    from tests.bench.training_runs import Told

ROOT = Path(__file__).resolve().parents[2]
DOUBLES = str(ROOT / "tests" / "doubles")
if DOUBLES not in sys.path:  # pytest puts it there for the tests
    sys.path.insert(0, DOUBLES)
PICTURE = ROOT / "docs" / "pictures" / "scratch-loss.png"


def run() -> Iterator[Figure]:
    """All figures; under eight minutes on two cores. Says on stderr how long each part took."""
    torch.set_num_threads(1)
    reason = why_no_quotas()
    if reason:
        sys.stderr.write(f"left out, as they need quotas: speed, re-planning, whole runs: {reason}\n")
    parts: list[tuple[bool, Callable[[], Iterator[Figure]]]] = [
        (True, unequal),
        (True, two_to_one),
        (True, equal),
        (False, exactness),
        (True, replanning),
        (True, scratch),
        (True, lora),
        (False, checkpoints),
        (False, simulation),
    ]
    sys.stderr.write("# killed workers, lost and added nodes: make test-ray (tests/ray/train)\n")
    for needs_quotas, part in parts:
        if needs_quotas and reason:
            continue
        began = time.perf_counter()
        yield from part()
        sys.stderr.write(f"# {part.__name__}: {time.perf_counter() - began:.0f} s\n")


FSDP2_EVEN = ("fsdp2", "even", "even")
FSDP2_SPEED = ("fsdp2", "speed", "even")
OURS = ("sharded", "speed", "speed")
OURS_SENT = ("sharded, sent", "speed", "speed")
OURS_EVEN = ("sharded", "even", "even")


def unequal() -> Iterator[Figure]:
    """Three ranks at 0.1, 0.2 and 0.4 of a core."""
    from tests.bench.training_speed import Contest, contest

    found = contest(Contest((0.1, 0.2, 0.4), (FSDP2_EVEN, FSDP2_SPEED, OURS_SENT, OURS)))
    yield _at_least("speeds 1:2:4: tokens/s against FSDP2, even", found.against(OURS, FSDP2_EVEN), "x", 3.1)
    yield _at_least("speeds 1:2:4: of the ideal", found.of_ideal(OURS), "share", 0.95)
    yield Figure("speeds 1:2:4: the same over the network stack, of the ideal", found.of_ideal(OURS_SENT), "share")
    yield Figure(
        "speeds 1:2:4: the same over the network stack, against FSDP2, even", found.against(OURS_SENT, FSDP2_EVEN), "x"
    )
    yield Figure("speeds 1:2:4: FSDP2, even, of the ideal", found.of_ideal(FSDP2_EVEN), "share")
    yield Figure("speeds 1:2:4: FSDP2, proportional, of the ideal", found.of_ideal(FSDP2_SPEED), "share")
    yield Figure("speeds 1:2:4: tokens/s", found.tokens_per_s(OURS), "tokens/s")


def two_to_one() -> Iterator[Figure]:
    """Two ranks at 0.15 and 0.45 of a core."""
    from tests.bench.training_speed import Contest, contest

    found = contest(Contest((0.15, 0.45), (FSDP2_EVEN, OURS), rounds=3))
    yield _at_least("speeds 1:3: of the ideal", found.of_ideal(OURS), "share", 0.90)
    yield Figure("speeds 1:3: tokens/s against FSDP2, even", found.against(OURS, FSDP2_EVEN), "x")


def equal() -> Iterator[Figure]:
    """Three ranks at 0.3 of a core each."""
    from tests.bench.training_speed import Contest, contest

    found = contest(Contest((0.3, 0.3, 0.3), (FSDP2_EVEN, OURS_SENT_EVEN, OURS_EVEN), rounds=3))
    yield _at_least("equal workers: tokens/s against FSDP2", found.against(OURS_EVEN, FSDP2_EVEN), "x", 1.2)
    yield Figure("equal workers: the same over the network stack", found.against(OURS_SENT_EVEN, FSDP2_EVEN), "x")


OURS_SENT_EVEN = ("sharded, sent", "even", "even")


def exactness() -> Iterator[Figure]:
    """Gradients, losses and memory of several splits against one process."""
    from tests.bench import training_exact

    yield from training_exact.rows()


def replanning() -> Iterator[Figure]:
    """The fastest of three workers is cut to a quarter after step 8 and gets it back after step 22."""
    from tests.bench import training_runs as runs

    cut_at, back_at, last = 8, 22, 34
    cores = (0.15, 0.3, 0.6)
    changes = {cut_at: (2, cores[2] / 4), back_at: (2, cores[2])}
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as temporary:
        folder = Path(temporary)
        made = runs.from_scratch(folder, steps=last, batchTokens=2048)
        fixed, _ = runs.run(made, folder / "fixed", cores, changes=changes, replanning=False)
        planned, _ = runs.run(made, folder / "planned", cores, changes=changes)

    def seconds(told: runs.Told, begin: int, end: int) -> float:
        return statistics.median(row.seconds for row in told.rows[begin:end])

    def share(begin: int, end: int) -> float:
        return statistics.median(row[2] for row in planned.shares[begin:end])

    before, low, high = share(4, cut_at), share(back_at - 8, back_at), share(last - 4, last)
    name = "fastest of three workers cut to a quarter"
    gain = seconds(fixed, cut_at + 5, back_at) / seconds(planned, cut_at + 5, back_at)
    yield _at_most(f"{name}: step with the new split", _steps_to(planned, cut_at, low), 5, "th step")
    yield _at_least(f"{name}: steps/s over not re-planning", gain, "x", 1.9)
    yield Figure(f"{name}: its share of the batch before", before, "share")
    yield Figure(f"{name}: its share of the batch while slow", low, "share")
    yield _at_least(f"{name}: share after it recovered, of that before", high / before, "share", 0.85)
    yield Figure(f"{name}: step with the old split after it recovered", _steps_to(planned, back_at, high), "th step")


def _steps_to(told: Told, changed_at: int, wanted: float) -> float:
    """The how-manyeth step after the change has the fastest rank's share within a fifth of where it settles."""
    for step in range(changed_at, len(told.shares)):
        if abs(told.shares[step][2] - wanted) <= 0.2 * wanted:
            return float(step - changed_at + 1)
    return float("inf")


def scratch() -> Iterator[Figure]:
    """A small model learns a book on three unequal workers, and on one process: the same curve."""
    from tests.bench import training_runs as runs
    from tests.bench.training_picture import draw

    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as temporary:
        folder = Path(temporary)
        made = runs.from_scratch(folder, steps=80, batchTokens=2048)
        one, _ = runs.run(made, folder / "one", ())
        three, _ = runs.run(made, folder / "three", (0.15, 0.3, 0.6))
    apart = [abs(a.loss - b.loss) for a, b in zip(one.rows, three.rows, strict=True)]
    name = "scratch, 3 unequal workers"
    yield Figure(f"{name}: largest difference to one process, 20 steps", max(apart[:20]), "nats")
    yield Figure(f"{name}: the same over {len(apart)} steps", max(apart), "nats")
    yield Figure(f"{name}: loss at the first step", three.rows[0].loss, "nats")
    yield Figure(f"{name}: loss at step {len(apart)}", three.rows[-1].loss, "nats")
    for rank, worker in enumerate(three.news["workers"]):
        yield Figure(f"{name}: batch share of rank {rank}", worker["batchShare"], "share")
    if not draw(one, three, PICTURE):
        sys.stderr.write("no picture: matplotlib is not installed\n")


def lora() -> Iterator[Figure]:
    """Adapters for SmolLM2 on two unequal workers: better on rows that it has not seen, and nothing else changed."""
    from tests.bench import training_runs as runs

    held_out = runs.DEPLOYMENTS / "data" / "quickstart-heldout.jsonl"
    with tempfile.TemporaryDirectory(prefix="fastserve-bench-") as temporary:
        folder = Path(temporary)
        model = runs.smollm2(folder)
        made = runs.adapters(folder, model, steps=5, batchTokens=512)
        told, store = runs.run(made, folder / "run", (0.5, 1.0))
        trained = runs.exported(made, store, folder)
        torch.set_num_threads(2)
        before = runs.perplexity(made, model, held_out)
        after = runs.perplexity(made, trained / "model", held_out)
        torch.set_num_threads(1)
        strange = runs.changed_beside_adapters(model, trained)
    yield Figure("LoRA on SmolLM2, 2 unequal workers: held-out perplexity before", before, "")
    yield Figure("LoRA on SmolLM2, 2 unequal workers: held-out perplexity after", after, "", "lower", after < before)
    yield Figure("LoRA on SmolLM2: tensors changed that have no adapter", len(strange), "", "0", not strange)
    error = told.news["proof"]["gradientError"]
    yield Figure("LoRA on SmolLM2: gradient error of the run's own proof, bf16", error, "relative")


def checkpoints() -> Iterator[Figure]:
    """What a save costs the steps."""
    from tests.bench import checkpoint_stall

    yield from checkpoint_stall.rows()


def simulation() -> Iterator[Figure]:
    """What the plan promises for 1,000 GPUs; not a measurement."""
    from tests.bench import simulation as simulated

    yield from simulated.rows()


def _at_least(name: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(name, value, unit, f">= {limit:g}", value >= limit)


def _at_most(name: str, value: float, limit: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f"<= {limit:g}", value <= limit)
