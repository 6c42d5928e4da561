"""FSDP2 behind the engine's interface: the same gradients, losses and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
import torch
import torch._dynamo  # brought in here, so that no forked rank does it
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks

from fastserve.stages.train.fsdp2 import Fsdp2
from fastserve.stages.train.group import Group
from fastserve.stages.train.network import Network
from fastserve.stages.train.shard import Sharded

EVEN = (1.0, 1.0, 1.0)
SPLIT = [(1, 2, 3), (1, 0, 1), (0, 1, 1)]
BATCH = tiny.samples(10)
TOKENS = tiny.trained_tokens(BATCH)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (tiny.full, {}),
        (lambda: tiny.full("llama-tied"), {"activation_checkpointing": True}),
        (tiny.lora, {"frozen_whole": True}),
        (tiny.lora, {"frozen_whole": False}),
    ],
)
def test_the_two_engines_agree(build: Callable[[], Network], options: dict[str, Any]) -> None:
    def rank() -> list[tuple[dict[str, torch.Tensor], float, list[float]]]:
        micros = tiny.micro_batches(BATCH, SPLIT, dist.get_rank())
        found = []
        for engine in (Fsdp2(build(), EVEN, Group.current(), **options), Sharded(build(), EVEN, Group.current())):
            losses, first, norm = [], None, 0.0
            for _ in range(5):
                engine.clear()
                losses.append(tiny.accumulate(engine, micros) / TOKENS)
                engine.scale(1 / TOKENS)
                assert engine.finite()
                if first is None:
                    first, norm = engine.gathered("gradients"), engine.norm()
                assert engine.step(1e-3, 0.5) > 0
            assert first is not None
            found.append((first, norm, losses))
        return found

    ranks = run_ranks(rank, 3)
    for (theirs, their_norm, _), (ours, our_norm, _) in ranks:
        assert tiny.difference(ours, theirs) <= 1e-6
        assert our_norm == pytest.approx(their_norm, rel=1e-6)
    for step in range(5):
        theirs_total, ours_total = (sum(found[engine][2][step] for found in ranks) for engine in (0, 1))
        assert ours_total == pytest.approx(theirs_total, rel=2e-6)


def test_bf16_agrees_too() -> None:
    def rank() -> list[float]:
        found = []
        for build in (Fsdp2, Sharded):
            engine = build(tiny.full(), EVEN, Group.current(), precision="bf16")
            engine.clear()
            found.append(tiny.accumulate(engine, tiny.micro_batches(BATCH, [(3, 3, 4)], dist.get_rank())) / TOKENS)
        return found

    theirs, ours = (sum(parts) for parts in zip(*run_ranks(rank, 3), strict=True))
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize(("first", "then"), [(Fsdp2, Sharded), (Sharded, Fsdp2)])
def test_each_reads_the_others_checkpoints(first: Any, then: Any, tmp_path: Path) -> None:
    def run() -> tuple[list[float], list[float]]:
        micros = tiny.micro_batches(BATCH, SPLIT, dist.get_rank())
        engine = first(tiny.full(), EVEN, Group.current(), weight_decay=0.1)

        def steps(engine: Any) -> list[float]:
            losses = []
            for _ in range(3):
                engine.clear()
                losses.append(tiny.accumulate(engine, micros) / TOKENS)
                engine.scale(1 / TOKENS)
                engine.step(1e-3, None)
            return losses

        steps(engine)
        dcp.save(engine.state(), checkpoint_id=tmp_path)
        other = then(tiny.full(seed=99), EVEN, Group.current(), weight_decay=0.1)
        dcp.load(other.state(), checkpoint_id=tmp_path)
        other.resume(3)
        return steps(engine), steps(other)

    ranks = run_ranks(run, 3)
    for step in range(3):
        on, anew = (sum(found[which][step] for found in ranks) for which in (0, 1))
        assert anew == pytest.approx(on, rel=2e-6)


def test_unequal_shares_and_single_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shares"):
        Fsdp2(tiny.full(), (1.0,), Group())
    with pytest.raises(ValueError, match="equal shares"):
        Fsdp2(tiny.full(), (1.0, 2.0), Group(0, 2))
