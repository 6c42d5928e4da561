"""A simulation, not a measurement: what the plan promises over even splits on clusters that nobody here has.

1,000 GPUs of four kinds, with speeds and memories from NVIDIA's public data sheets (dense bf16 tensor operations, so
without sparsity): H100 SXM 989 TFLOPS and 80 GB; A100 SXM 312 TFLOPS and 80 GB; L40S 362 TFLOPS and 48 GB; L4 121
TFLOPS and 24 GB. Every GPU is taken to keep up the same part of its figure, and communication to cost nothing, so the
result is the most that sharing by speed can give; the real runs in docs/benchmarks.md say how much of it is left.

An even split gives every GPU the same batch and the same state, so a step ends with the slowest, and the smallest
memory has to hold as much as the largest. Two are compared with: that of all GPUs, and the fastest of those that
leave some kinds idle, which is what one does without a planner. The plan may leave kinds idle as well, where their
memory is too small.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

from tests.bench.figure import Figure, below

from fastserve.errors import InsufficientMemory
from fastserve.plan.accelerators import operations_s
from fastserve.plan.facts import ModelFacts, WorkerFacts
from fastserve.plan.shares import plan_shares
from fastserve.plan.training import ACCELERATOR_MICRO_BATCH_TOKENS, training_facts
from fastserve.spec.train import Train

MEMORY_BYTES = {"H100": 80 * 10**9, "A100": 80 * 10**9, "L40S": 48 * 10**9, "L4": 24 * 10**9}

MIXES: dict[str, Mapping[str, int]] = {
    "250 of each": {"H100": 250, "A100": 250, "L40S": 250, "L4": 250},
    "100 H100, 200 A100, 300 L40S, 400 L4": {"H100": 100, "A100": 200, "L40S": 300, "L4": 400},
    "600 H100, 300 A100, 50 L40S, 50 L4": {"H100": 600, "A100": 300, "L40S": 50, "L4": 50},
    "900 A100, 100 L4": {"A100": 900, "L4": 100},
    "500 H100, 500 A100": {"H100": 500, "A100": 500},
}
"""Workers of each kind, 1,000 together."""

BATCH_TOKENS = 16_000_000
"""In one optimizer step: 16,000 a worker."""

TRAIN = Train.model_validate(
    {"dataset": "file:///d", "method": "full", "maxLength": 2048, "activationCheckpointing": True}
)

MODELS: dict[str, dict[str, int]] = {
    "8B": {"parameters": 8_030_000_000, "layers": 32, "hidden": 4096, "intermediate": 14_336, "vocab": 128_256},
    "32B": {"parameters": 32_760_000_000, "layers": 64, "hidden": 5120, "intermediate": 27_648, "vocab": 152_064},
    "70B": {"parameters": 70_600_000_000, "layers": 80, "hidden": 8192, "intermediate": 28_672, "vocab": 128_256},
}
"""Shapes of today's dense models of such sizes."""


def rows() -> Iterator[Figure]:
    """Predicted speed-ups of the plan over even splits, and how long planning takes."""
    for mix, counts in MIXES.items():
        for size in MODELS:
            planned, even = _fastest(size, counts, even=False), _fastest(size, counts, even=True)
            even_of_all = _step_seconds(size, counts, even=True)
            if planned is None or even is None:
                continue
            name = f"simulation, {size} on {mix}"
            if even_of_all is not None:
                yield Figure(f"{name}: over the even split of all", even_of_all / planned, "x")
            fits = "" if even_of_all is not None else ", that of all does not fit"
            yield Figure(f"{name}: over the best even split of some kinds{fits}", even / planned, "x")
    for workers, limit in ((1000, 1.0), (10_000, 1.0)):
        yield below(f"planning {workers:,} workers", _planning_seconds(workers), "s", limit)


def _fastest(size: str, counts: Mapping[str, int], even: bool) -> float | None:
    """Seconds of the shortest step with any choice of the kinds; None where none fits."""
    choices = (
        {kind: counts[kind] for kind in chosen}
        for number in range(1, len(counts) + 1)
        for chosen in itertools.combinations(counts, number)
    )
    found = (_step_seconds(size, choice, even) for choice in choices)
    return min((seconds for seconds in found if seconds is not None), default=None)


def _step_seconds(size: str, counts: Mapping[str, int], even: bool) -> float | None:
    """Predicted seconds of a step; None where it does not fit."""
    model = _model(size)
    workers = _workers(counts, 6.0 * model.parameters)
    facts = training_facts(model, TRAIN, accelerated=True)
    try:
        return plan_shares(workers, facts, BATCH_TOKENS, even=even).step_seconds
    except InsufficientMemory:
        return None


def _model(size: str) -> ModelFacts:
    shape = MODELS[size]
    return ModelFacts(
        architecture="LlamaForCausalLM",
        weight_bytes=2 * shape["parameters"],
        heads=shape["hidden"] // 128,
        kv_heads=8,
        head_dim=128,
        max_context=8192,
        tied_embeddings=False,
        dtype="bfloat16",
        **shape,
    )


def _workers(counts: Mapping[str, int], token_operations: float) -> list[WorkerFacts]:
    return [
        WorkerFacts(
            name=f"{kind}-{number}",
            profile=kind.lower(),
            tokens_per_s=operations_s(kind) / token_operations,
            memory_bytes=int(MEMORY_BYTES[kind] * 0.92),
            most_tokens=ACCELERATOR_MICRO_BATCH_TOKENS,
        )
        for kind, count in counts.items()
        for number in range(count)
    ]


def _planning_seconds(workers: int) -> float:
    """Wall seconds of one plan, the best of three."""
    model = _model("8B")
    found = _workers(dict.fromkeys(MEMORY_BYTES, workers // 4), 6.0 * model.parameters)
    facts = training_facts(model, TRAIN, accelerated=True)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        plan_shares(found, facts, BATCH_TOKENS)
        taken.append(time.perf_counter() - began)
    return min(taken)
