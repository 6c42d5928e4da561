"""Ranks of one machine that share memory: the same numbers as over the network, nothing left behind, no hanging."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks

from fastserve.stages.train import neighbours
from fastserve.stages.train.group import Group
from fastserve.stages.train.neighbours import FOLDER, meet
from fastserve.stages.train.shard import Sharded

BATCH = tiny.samples(9)


def steps(engine: Sharded, count: int, pause: float = 0.0) -> list[float]:
    losses = []
    for step in range(count):
        engine.clear()
        mine = tiny.micro_batches(tiny.samples(9, seed=step), [(3, 3, 3)], dist.get_rank())
        losses.append(tiny.accumulate(engine, mine))
        engine.scale(1 / tiny.trained_tokens(BATCH))
        time.sleep(pause * dist.get_rank())
        engine.step(1e-3, 1.0)
    return losses


def test_a_run_is_the_same_as_over_the_network_also_when_ranks_are_late() -> None:
    def rank(shared: bool, pause: float) -> tuple[list[float], list[Any], int]:
        engine = Sharded(tiny.full("llama-tied"), (1, 0, 2), Group.current(), neighbours=shared)
        return steps(engine, 6, pause), engine.collectives, engine.kept_bytes

    sent = run_ranks(rank, 3, False, 0.0)
    for pause in (0.0, 0.01):
        shared = run_ranks(rank, 3, True, pause)
        for (ours, log, kept), (theirs, their_log, their_kept) in zip(shared, sent, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-6)
            assert (log, kept) == (their_log, their_kept)


def test_the_parameters_of_all_ranks_are_one_memory() -> None:
    def rank() -> float:
        network = tiny.full()
        engine = Sharded(network, (1, 1), Group.current())
        if dist.get_rank() == 0:
            for chunk in engine.state().values():
                chunk.plain().fill_(7.0)
        dist.barrier()
        engine.clear()
        tiny.accumulate(engine, [])
        return sum(float((parameter == 7.0).sum()) for parameter in network.trained.values()) / sum(
            parameter.numel() for parameter in network.trained.values()
        )

    assert run_ranks(rank, 2) == pytest.approx([0.5, 0.5], abs=0.01)


def test_nothing_is_left_in_shared_memory() -> None:
    def rank() -> list[str]:
        engine = Sharded(tiny.full(), (1, 2, 3), Group.current())
        steps(engine, 1)
        return [path.name for path in FOLDER.glob("fastserve-*")]

    before = {path.name for path in FOLDER.glob("fastserve-*")}
    assert all(set(names) <= before for names in run_ranks(rank, 3))


def test_a_neighbour_that_dies_is_an_error_and_not_a_wait() -> None:
    def rank() -> None:
        engine = Sharded(tiny.full(), (1, 2, 3), Group.current())
        steps(engine, 1)
        if dist.get_rank() == 1:
            os._exit(9)
        with pytest.raises(RuntimeError, match="onnection"):
            steps(engine, 3)
        raise RuntimeError("told")

    began_at = time.monotonic()
    with pytest.raises(RankFailed, match=r"died without an answer|told"):
        run_ranks(rank, 3, timeout=400)
    assert time.monotonic() - began_at < 300


@pytest.mark.parametrize("cause", ["no folder", "too small"])
def test_without_enough_shared_memory_the_network_is_used(
    cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if cause == "no folder":
        monkeypatch.setattr(neighbours, "FOLDER", tmp_path / "absent")

    def rank() -> bool:
        return meet(Group.current(), 2**50 if cause == "too small" else 4096, 4096) is None

    assert run_ranks(rank, 2) == [True, True]


def test_one_worker_has_no_neighbours() -> None:
    assert meet(Group(), 4096, 4096) is None
    assert meet(Group(0, 2, torch.device("meta")), 4096, 4096) is None
