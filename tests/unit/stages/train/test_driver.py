"""What the driver hands to its workers."""

import os
from typing import Any

import pytest

from fastserve.errors import AttemptFenced, InsufficientMemory, NotExecutable, StageFailed
from fastserve.plan.brought import Kind
from fastserve.stages.train.driver import one_host, raise_for
from fastserve.stages.train.machines import worker_environment, worker_threads

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize("workers", [1, 2, 3, 64])
def test_the_workers_of_one_machine_have_no_more_threads_than_it_has_cores(workers: int) -> None:
    threads = worker_threads(workers, nodes=1)
    assert threads >= 1
    assert threads * workers <= max(CORES, workers)
    assert worker_environment(threads, one_machine=True)["OMP_NUM_THREADS"] == str(threads)


def test_a_worker_with_a_machine_of_its_own_has_all_its_cores() -> None:
    assert worker_threads(4, nodes=4) == CORES


def ended(**changed: Any) -> dict[str, Any]:
    return {"step": 10, "reason": "", "message": "", "early": False, **changed}


def test_what_the_workers_say_in_the_end_is_what_the_stage_raises() -> None:
    raise_for(ended(), 10)
    raise_for(ended(step=4, early=True), 10)
    with pytest.raises(StageFailed, match="at step 4 of 10"):
        raise_for(ended(step=4), 10)
    with pytest.raises(StageFailed, match="without a word"):
        raise_for(None, 10)
    with pytest.raises(AttemptFenced, match="a newer attempt"):
        raise_for(ended(step=-1, reason="AttemptFenced", message="a newer attempt"), 10)
    with pytest.raises(InsufficientMemory):
        raise_for(ended(step=-1, reason="InsufficientMemory", message="3 GiB are missing"), 10)
    with pytest.raises(NotExecutable, match="fp8 does not run"):
        raise_for(ended(step=-1, reason="NotExecutable", message="fp8 does not run"), 10)
    with pytest.raises(StageFailed, match="not a finite number"):
        raise_for(ended(step=-1, reason="StageFailed", message="the loss is not a finite number"), 10)


@pytest.mark.parametrize(
    ("workers", "kind", "threads"),
    [
        (2, Kind(1), 1),  # one on each machine
        (2, Kind(4), 2),
        (1, Kind(4), 4),
        (16, Kind(4), 1),
        (2, Kind(0.5), 1),
        (2, Kind(16, 1), 16),
        (16, Kind(96, 8), 12),
    ],
)
def test_the_workers_of_a_machine_that_is_brought_share_its_cpus(workers: int, kind: Kind, threads: int) -> None:
    assert worker_threads(workers, nodes=1, kind=kind) == threads


def test_a_worker_sleeps_while_it_waits_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_environment(2, one_machine=True)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert worker_environment(2, one_machine=True)["OMP_WAIT_POLICY"] == "ACTIVE"


def ray_node(address: str, cpus: float, alive: bool = True) -> dict[str, Any]:
    resources = {"CPU": cpus} if cpus else {}  # Ray does not list what a node has none of
    return {"Alive": alive, "NodeManagerAddress": address, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "workers", "one"),
    [
        ([ray_node("10.0.0.1", 2), ray_node("10.0.0.1", 2)], 4, True),
        ([ray_node("10.0.0.1", 2), ray_node("10.0.0.2", 2, alive=False)], 2, True),
        ([ray_node("10.0.0.1", 2), ray_node("10.0.0.2", 2)], 2, False),
        # Machines are on their way: the head of a cluster that began at none, and one machine of two.
        ([ray_node("10.0.0.1", 0)], 2, False),
        ([ray_node("10.0.0.1", 1)], 2, False),
    ],
)
def test_workers_of_one_machine_talk_over_loopback(nodes: list[dict[str, Any]], workers: int, one: bool) -> None:
    assert one_host(nodes, workers) is one
